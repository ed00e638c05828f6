"""LoRA on CPU by kernels of our own: what compiles them, calls them, and gives them to torch.

An adapter is one read-only block of memory; a slot is a row of pointers into it (`lora.cpp`). The parts, each
usable without vLLM: `build` compiles C++ at first use, `kernels` is the typed face of the C functions, `ops` the
operators that torch.compile can keep in a graph.
"""
