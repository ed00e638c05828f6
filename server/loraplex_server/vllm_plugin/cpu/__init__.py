"""LoRA on CPU in native mode: adapters as blocks of memory that C++ kernels read through a table of pointers."""
