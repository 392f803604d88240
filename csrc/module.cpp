// The Python module: what was built and how, and the host lane's order. The ops register themselves
// (cache.cu).
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "host_lane.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["nvcc"] = SDVG_BUILD_NVCC;
        info["archs"] = SDVG_BUILD_ARCHS;
        info["flags"] = SDVG_BUILD_FLAGS;
        info["torch"] = SDVG_BUILD_TORCH;
        info["stable_abi"] = SDVG_BUILD_STABLE_ABI;
        return info;
      },
      "Return what the extension was built with: nvcc, archs, flags, torch, stable_abi.");
  module.def(
      "set_host_order", [](uint64_t order) { sdvg::host_order = order; }, py::arg("order"),
      "Run the threads of the host lane forward (0), backward (1) or shuffled with a seed.");
}
