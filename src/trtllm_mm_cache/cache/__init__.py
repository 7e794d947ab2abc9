"""The cache core: keys, the arena, the manager with its leases and reservations, single flight.

Pure: no sockets, no engine, no clock. `key` says what an embedding is, `arena` owns the bytes,
`manager` decides what stays in them, `flight` makes sure each is produced once.
"""
