"""The encode worker: `pipeline` makes embeddings of items, `server` answers PD workers with them."""
