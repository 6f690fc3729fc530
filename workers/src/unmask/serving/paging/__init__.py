"""The block cache's bookkeeping: which page holds which block of which request, and what can be shared.

Numbers and hashes alone; the tensors are :class:`unmask.models.paged.PagedCache`'s.
"""

from unmask.serving.paging.digests import digest_of, digests_of, root_digest
from unmask.serving.paging.pool import BlockPool, Holding

__all__ = ["BlockPool", "Holding", "digest_of", "digests_of", "root_digest"]
