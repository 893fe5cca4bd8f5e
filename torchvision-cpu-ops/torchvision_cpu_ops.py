"""Let a CUDA-built torchvision be imported beside a CPU-only torch.

torchvision._meta_registrations registers fake kernels for torchvision::nms and ::qnms. With a CPU
torch the compiled library that defines them cannot be loaded, so the import fails although
transformers and vLLM only use the pure-Python image transforms. This finder declares the two
schemas at the moment that module is looked up, and only if they are missing.
"""
import sys

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
LIBRARIES = []  # a torch Library unregisters its schemas when it is garbage collected


class DeclareMissingOps:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision._meta_registrations":
            import torch
            for op in ("nms", "qnms"):
                if not hasattr(torch.ops.torchvision, op):
                    LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
                    LIBRARIES[-1].define(op + SCHEMA)
        return None  # the usual finders load the module


sys.meta_path.insert(0, DeclareMissingOps)
