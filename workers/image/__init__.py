"""Runs in: image (a pool, on demand, own uid, no capabilities).

The registry client: it turns a reference into a verified manifest and config, and pours verified layer
blobs into pipes that others read. It owns nothing on disk; what it keeps in memory (tokens, TLS contexts)
may vanish with it at any time. It refuses every byte whose digest or size was not the one announced.

    main          handlers, threads
    resolve       a reference -> manifest, config, layers     blobs         a blob -> a pipe
    client        one registry's API, and its login           transport     HTTP: TLS, proxies, redirects
    manifests     what documents say, sans-IO                 platforms     which one is for this machine
    registries    registries.conf                             names         short names
    credentials   whose password goes where                   tokens        challenges and bearer tokens
    certificates  certs.d                                     proxies       HTTPS_PROXY and the like
    policy        which signatures an image needs             signatures    where they are
    verifier      whose they are: a child that asks gpgv and openssl
    failures      what went wrong, and whether to try again   operation     how a request is ended
"""
