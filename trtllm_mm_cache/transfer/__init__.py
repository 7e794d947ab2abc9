"""Transfer: an embedding's way from the encode worker's arena into the PD worker's, with NIXL.

Where both are one user's on one machine, `MappedReader` copies from the mapped arena in step 4's place.

1. Each process has one `TransferAgent` and registers its arenas with it, once.
2. Encode worker: `Exporter.export(lease)` pins an entry and names it: token, address, size, checksum.
3. Name and `PeerMetadata` travel in the encode worker's answer, over Dynamo's request plane.
4. PD worker: `Reader.read_into(reservation, peer, export)` READs the bytes straight into the reserved extent,
   in chunks; what has arrived is checked while the next chunks are under way.
5. With the last byte a notification carries the token to the exporter, which releases its lease: the ack.
6. The checksum over what arrived must be the exported one; then the caller checks the shape and commits.
7. A READ that NIXL has not ended at its deadline, or whose caller left, is still watched: its extent stays
   in quarantine until every chunk that was asked for has settled. Time alone never frees it.
8. A PD worker that never READs costs a lease until the timeout; a READ after that fails the checksum.
9. A dead exporter fails the READ at once, a frozen one at the deadline; a restarted one is another agent.
10. Only the agent thread calls NIXL. Nothing here blocks the event loop or waits without a deadline.
"""

from trtllm_mm_cache.transfer.agent import TransferAgent
from trtllm_mm_cache.transfer.exporter import Exporter
from trtllm_mm_cache.transfer.mapped import MappedReader
from trtllm_mm_cache.transfer.messages import Export, PeerMetadata
from trtllm_mm_cache.transfer.reader import Reader

__all__ = [
    "Export",
    "Exporter",
    "MappedReader",
    "PeerMetadata",
    "Reader",
    "TransferAgent",
]
