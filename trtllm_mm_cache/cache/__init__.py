"""The cache core: keys, the arena, the manager with its leases and reservations, single flight.

Pure: no sockets, no engine, no event loop but in `flight`. `key` says what an embedding is, `arena` owns
the bytes, `manager` decides what stays in them, `eviction` in which order they go, `flight` makes sure that
each is produced once at a time.

To use it elsewhere, take this folder and `errors.py`, which is all of this project that it imports
(import-linter holds it to that); besides it wants torch, NumPy, sortedcontainers, psutil and blake3::

    cache = MultimodalEmbeddingCacheManager(2 * 1024**3)          # committed now, never exceeded
    key = embedding_key(content_digest(image_bytes), fingerprint=model_digest).hex

    lease = cache.lease(key)
    if lease is None:
        reservation = cache.reserve(key, nbytes, owner="me")      # evicts; raises ArenaFullError
        reservation.write(tensor)                                 # or have it written at .address
        lease = reservation.commit(dtype=tensor.dtype, shape=tuple(tensor.shape))
    with lease:
        use(lease.tensor)                                         # a view: nothing was copied

Or as the class of that name in Dynamo: `cache.get(key)`, `cache.set(key, CachedEmbedding(tensor))`.
`SingleFlight.run` around the miss keeps a burst of equal requests to one producer.
"""
