"""The demo: a mixture-of-experts model of ``transformers`` with PEFT adapters, served by the generated kernels."""
