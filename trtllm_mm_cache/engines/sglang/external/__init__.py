"""Models that SGLang loads by `SGLANG_EXTERNAL_MODEL_PACKAGE`, having none itself: `language_part`."""
