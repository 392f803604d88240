// One source, two lanes. A kernel is a struct of parameters with
//
//   static constexpr int kPhases;                   the phases between its barriers
//   template <int kPhase>
//   __host__ __device__ void phase(Place at, uint8_t* shared) const;      what one thread does in
//   one of them
//
// On the device the phases of a thread follow each other with __syncthreads() between. On the host
// the same grid runs block by block, phase by phase, thread by thread, in an order that a test
// chooses (host_lane.h): what a thread keeps for a later phase is in `shared`, so a missing barrier
// or an overlap gives wrong bytes there too.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <utility>

#include "check.h"
#include "host_lane.h"

namespace sdvg {

enum class Lane { kDevice, kHost };

// most threads of a block, in every kernel
constexpr uint32_t kThreads = 256;
// blocks that a multiprocessor holds of every kernel: of 64 K registers, 64 a thread
constexpr int kResident = 4;

struct Place {
  uint3 block;
  uint32_t thread;
};

template <class Kernel>
__global__ void __launch_bounds__(kThreads, kResident)
    run_on_device(const __grid_constant__ Kernel kernel) {
  extern __shared__ __align__(16) uint8_t shared[];
  const Place at{blockIdx, threadIdx.x};
  [&]<int... kPhase>(std::integer_sequence<int, kPhase...>) {
    (((kPhase > 0 ? __syncthreads() : void()), kernel.template phase<kPhase>(at, shared)), ...);
  }(std::make_integer_sequence<int, Kernel::kPhases>{});
}

template <class Kernel>
void run_on_host(const Kernel& kernel, dim3 grid, size_t shared_bytes) {
  Order order;
  std::vector<uint8_t> shared(shared_bytes);
  for (const uint32_t block : order.of(grid.x * grid.y * grid.z)) {
    const uint3 index{block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    // shared memory is never zero by luck
    std::fill(shared.begin(), shared.end(), uint8_t{0xff});
    [&]<int... kPhase>(std::integer_sequence<int, kPhase...>) {
      const auto run = [&]<int kThis>(std::integral_constant<int, kThis>) {
        for (const uint32_t thread : order.of(kThreads))
          kernel.template phase<kThis>(Place{index, thread}, shared.data());
      };
      (run(std::integral_constant<int, kPhase>{}), ...);
    }(std::make_integer_sequence<int, Kernel::kPhases>{});
  }
}

// shared memory that every architecture gives a block without asking
constexpr uint32_t kSharedBytes = 48 << 10;

// bytes of shared memory that a block may have; the host lane has what an RTX 4090 has
template <Lane kLane>
uint32_t most_shared_bytes(const torch::stable::Tensor& on) {
  int bytes = 99 << 10;
  if constexpr (kLane == Lane::kDevice)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, on.get_device_index());
  return static_cast<uint32_t>(bytes);
}

// blocks that are resident at once on the whole machine; few on the host lane, so that they loop
template <Lane kLane>
int64_t resident_blocks(const torch::stable::Tensor& on) {
  if constexpr (kLane == Lane::kHost) return 3;
  int processors = 1;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, on.get_device_index());
  return static_cast<int64_t>(processors) * kResident;
}

// runs `kernel` on the grid; `on` is a tensor of the device
template <Lane kLane, class Kernel>
void launch(const char* op, const Kernel& kernel, dim3 grid, size_t shared_bytes,
            const torch::stable::Tensor& on) {
  if constexpr (kLane == Lane::kHost) {
    run_on_host(kernel, grid, shared_bytes);
  } else {
    SDVG_CHECK(grid.y <= 65535 && grid.z <= 65535, op, "batch must be at most 65535");
    const int32_t device = on.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    if (shared_bytes > kSharedBytes)
      cudaFuncSetAttribute(run_on_device<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(shared_bytes));
    run_on_device<<<grid, kThreads, shared_bytes, current_stream(device)>>>(kernel);
    check_launch(op);
  }
}

}  // namespace sdvg
