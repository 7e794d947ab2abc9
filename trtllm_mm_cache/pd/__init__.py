"""The PD worker: its requests, the way of their items (`resolve`, read it first), and their answers."""
