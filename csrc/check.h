// What host code checks: arguments, launches, and the stream that torch is on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// absent from a CPU-only torch: weak, so that the module loads there and registers its ops
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace sdvg {

// one sentence, as in sdvg_kernels/_check.py: "{op}: {argument} must {rule}"
#define SDVG_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)

inline cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "sdvg_kernels: torch must be a CUDA build to launch a kernel");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "sdvg_kernels: torch must know the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": launch must succeed, got ",
                  cudaGetErrorString(error));
}

}  // namespace sdvg

// on the device a broken precondition stops the kernel; on the host lane it is an exception
#ifdef __CUDA_ARCH__
#define SDVG_DEVICE_CHECK(condition, text) \
  do {                                     \
    if (!(condition)) __trap();            \
  } while (0)
#else
#define SDVG_DEVICE_CHECK(condition, text) STD_TORCH_CHECK(condition, text)
#endif
