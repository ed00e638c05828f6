"""Stand-in."""
import torch
from loraplex_server.vllm_plugin.cpu import kernels
lib = torch.library.Library("loraplex", "DEF")
for name, kind in (("add_lora", 0), ("add_lora_logits", 1), ("add_lora_embedding", 0)):
    lib.define(f"{name}(Tensor(a!) y, Tensor x, int module) -> ()")
    lib.impl(name, (lambda k: lambda y, x, module: kernels.CURRENT.add(module, k, y, x))(kind), "CPU")
    lib.impl(name, lambda y, x, module: None, "Meta")
