"""The processes: `frontend`, `encode` and `pd`, over Dynamo's runtime.

`resolver` tells the way of a request's images from reference to leased view; read it first.
"""
