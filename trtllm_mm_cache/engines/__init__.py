"""Engines: what turns images into embeddings (`VisionEncoder`) and prompts into tokens (`Generator`).

`base` holds the two protocols; `transformers` runs them on Hugging Face's models on any torch device,
`trtllm` on TensorRT-LLM; `vllm` runs the second of them on vLLM. `huggingface` is what two of them share.
Each engine is an optional extra and is imported only when chosen.
"""
