"""Lets torchvision's CUDA build be imported beside a CPU build of torch, for `make sglang` on a machine without a GPU.

SGLang imports torchvision whatever it serves, an index may have its CUDA build only, and that one cannot load its
operators there, of which it then registers fakes, in vain. This defines their names when torchvision is first looked
for. `torchvision_operators.pth` runs it in every interpreter of the environment.
"""
# SPDX-License-Identifier: Apache-2.0

import sys


class _DefinesOperators:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _keep.append(self)  # operators last as long as their library


_keep: list[_DefinesOperators] = []
sys.meta_path.insert(0, _DefinesOperators())
