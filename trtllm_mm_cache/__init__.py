"""Content-keyed cache of vision-encoder outputs for disaggregated multimodal serving.

Importing this package loads no GPU stack, no engine and no transfer library.
The parts, from the floor up: `errors` and `config`; `cache`; `media`, `transfer`,
`engines` and `observability`; `workers`; `cli`. `docs/architecture.md` draws them.
"""

__version__ = "0.1.0"
