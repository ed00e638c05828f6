"""Stand-in."""
import ctypes
import numpy as np, torch

CURRENT = None

def reason_unavailable(): return ""
def packed_b_bytes(out, rank, dtype): return out * rank * dtype.itemsize
def pack_b(address, b, scale):
    t = (b.float() * scale).to(b.dtype).contiguous()
    ctypes.memmove(address, t.data_ptr(), t.numel() * t.itemsize)

def view(address, shape, dtype):
    n = int(np.prod(shape)) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * n).from_address(address), dtype=dtype).view(shape)

class Table:
    def __init__(self, shapes, slots):
        self.shapes = shapes; self.slots = {}; self.rows = [None, None]; self.dtype = None
    def use(self):
        global CURRENT
        CURRENT = self
    def bind(self, slot, block):
        self.slots[slot] = {(int(m), int(s)): (int(r), int(a), int(b)) for m, s, r, a, b in zip(block.module, block.slice, block.rank, block.a, block.b)}
    def unbind(self, slot): self.slots.pop(slot, None)
    def set_rows(self, tokens, samples): self.rows = [tokens, samples]
    def add(self, module, kind, y, x):
        rows = self.rows[kind]
        width, outs = self.shapes[module]
        for slot in np.unique(rows[rows >= 0]):
            where = torch.from_numpy(np.flatnonzero(rows == slot))
            start = 0
            for s, out in enumerate(outs):
                got = self.slots[int(slot)].get((module, s))
                if got:
                    r, a, b = got
                    A = view(a, (r, width), y.dtype); B = view(b, (out, r), y.dtype)
                    low = x[where].float() @ A.float().t() if x.dim() == 2 else A.t()[x[where]].float()
                    y[where, start:start+out] += (low @ B.float().t()).to(y.dtype)
                start += out
