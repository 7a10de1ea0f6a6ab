"""What would native code save? The rule of DToP and BatchNorm of FCN heads in C, beside the plain exit; one thread.

    python -m docs.evidence.performance.native_exit quickstart fp32
    python -m docs.evidence.performance.native_exit tiny-660 bf16

Dense, plain and native take turns in one process, and native decisions must be the plain ones. Milliseconds are of the
thread's own CPU, medians: of an exit without its head's products, and of the whole call. Needs a C compiler (`cc`).
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.conversion import median_interval
from benchmarks.exit_cost import LEAVING, METHODS, SHAPES, some
from torch import Tensor, nn

from tokenexit.engine.tokens import Packing
from tokenexit.heads import HeadOutput
from tokenexit.methods import Dense, DToP
from tokenexit.methods.thresholded import of_exit
from tokenexit.runtime.memory import keep_buffers
from tokenexit.runtime.precision import inference

ROUNDS = 80
SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* relu((x - mean) w / sqrt(var + eps) + b), in place */
void norm_relu(float* x, const float* mean, const float* var, const float* w, const float* b, float eps,
               int64_t rows, int64_t channels) {
  float scale[4096], shift[4096];
  for (int c = 0; c < channels; c++) { scale[c] = w[c] / sqrtf(var[c] + eps); shift[c] = b[c] - mean[c] * scale[c]; }
  for (int64_t p = 0; p < rows; p++)
    for (int c = 0; c < channels; c++) { float y = x[p * channels + c] * scale[c] + shift[c];
      x[p * channels + c] = y > 0 ? y : 0; }
}

/* best class, score above tau, the k best of each class stay, the rest is gathered; returns how many rows are left */
int64_t leave(const float* logits, int64_t rows, int64_t classes, float tau, int k, int64_t prefix, int64_t* label,
              const char* x, int64_t bytes, const int64_t* position, char* out, int64_t* out_position) {
  uint8_t* easy = malloc(rows);
  float* top = malloc(sizeof(float) * classes * k);
  int64_t* who = malloc(sizeof(int64_t) * classes * k);
  int* count = calloc(classes, sizeof(int));
  for (int64_t p = 0; p < rows; p++) {
    const float* r = logits + p * classes;
    int best = 0;
    for (int c = 1; c < classes; c++) if (r[c] > r[best]) best = c;
    float sum = 0;
    for (int c = 0; c < classes; c++) sum += expf(r[c] - r[best]);
    float score = 1 / sum, *t = top + best * k;
    int64_t* w = who + best * k;
    label[p] = best;
    easy[p] = score > tau;
    if (!easy[p] || (count[best] == k && score <= t[k - 1])) continue;
    int i = count[best] < k ? count[best]++ : k - 1;
    for (; i > 0 && t[i - 1] < score; i--) { t[i] = t[i - 1]; w[i] = w[i - 1]; }
    t[i] = score; w[i] = p;
  }
  for (int c = 0; c < classes; c++) for (int i = 0; i < count[c]; i++) easy[who[c * k + i]] = 0;
  int64_t n = 0;
  for (int64_t row = 0; row < rows + prefix; row++)
    if (row < prefix || !easy[row - prefix]) { memcpy(out + n * bytes, x + row * bytes, bytes);
      out_position[n++] = position[row]; }
  free(easy); free(top); free(who); free(count);
  return n;
}
"""


def library(folder: Path) -> ctypes.CDLL:
    (folder / "exit.c").write_text(SOURCE)
    flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, str(folder / "exit.c"), "-o", str(folder / "exit.so"), "-lm"], check=True)
    made = ctypes.CDLL(str(folder / "exit.so"))
    p, n, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    made.norm_relu.argtypes = [p, p, p, p, p, f, n, n]
    made.leave.argtypes = [p, n, n, f, ctypes.c_int, n, p, p, n, p, p, p]
    made.leave.restype = n
    return made


def native_exit(native: ctypes.CDLL) -> Any:
    def at_exit(self: Any, n: int, tokens: Any, state: Any, model: Any) -> Any:
        head, patches, x = model.exit_heads[n], tokens.patches(), tokens.x.contiguous()
        hidden, norm = head.proj(patches.x).float(), head.norm
        parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        native.norm_relu(hidden.data_ptr(), *(part.data_ptr() for part in parts), norm.eps, *hidden.shape)
        logits = head.classifier(hidden)
        as_float, label = logits.float(), torch.empty(len(logits), dtype=torch.int64)
        kept, position = torch.empty_like(x), torch.empty_like(tokens.position)
        rows = native.leave(
            as_float.data_ptr(),
            *as_float.shape,
            of_exit(self.threshold, n),
            self.keep_per_class,
            tokens.num_prefix,
            label.data_ptr(),
            x.data_ptr(),
            x.shape[1] * x.element_size(),
            tokens.position.data_ptr(),
            kept.data_ptr(),
            position.data_ptr(),
        )
        state = self._write(head, patches, HeadOutput(logits, patches.packing), state, model)
        exit_index = state.exit_index.write(patches.position, n)
        state = replace(state, label=state.label.write(patches.position, label), exit_index=exit_index)
        packing = Packing.of([rows], x.device)
        return replace(tokens, x=kept[:rows], position=position[:rows], packing=packing), state

    return at_exit


def main() -> None:
    shape, precision = sys.argv[1:]
    keep_buffers()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, image = SHAPES[shape]()
    spent: dict[str, float] = defaultdict(float)

    def timed(part: str, function: Any) -> Any:
        def run(*arguments: Any) -> Any:
            start = time.thread_time()
            result = function(*arguments)
            spent[part] += 1e3 * (time.thread_time() - start)
            return result

        return run

    for head in model.exit_heads:
        for layer in head.modules():
            if isinstance(layer, nn.Linear):
                layer.forward = timed("products", layer.forward)  # type: ignore[method-assign]
    ms: dict[str, list[float]] = defaultdict(list)
    live: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder, inference(image.device, precision):  # type: ignore[arg-type]
        method = some(model, image, METHODS["dtop"], LEAVING)
        ways = {"plain": DToP.at_exit, "native": native_exit(library(Path(folder)))}
        for turn in range(ROUNDS + 5):
            for name in ("dense", *ways):
                spent.clear()
                with patch.object(DToP, "at_exit", timed("exits", ways.get(name, DToP.at_exit))):
                    start = time.thread_time()
                    out = model([image], Dense() if name == "dense" else method)
                    took = 1e3 * (time.thread_time() - start)
                if name != "dense":
                    live[name] = out.exit_index[0]
                if turn >= 5:
                    ms[name].append(took)
                    ms[f"{name}, an exit"].append((spent["exits"] - spent["products"]) / len(model.config.exits))
        ratio = 1 / model([image], method).ledger.share_of_dense[0]
    assert torch.equal(live["plain"], live["native"]), "native decisions are the plain ones"
    for name in ways:
        gains = median_interval([dense / own for dense, own in zip(ms["dense"], ms[name])])
        conversion = [round((gain - 1) / (ratio - 1), 2) for gain in gains]
        print(
            f"{name}: {median(ms[name]):.1f} ms of {median(ms['dense']):.1f}, conversion {conversion}, an exit "
            f"without products {median(ms[f'{name}, an exit']):.2f}"
        )


if __name__ == "__main__":
    main()
