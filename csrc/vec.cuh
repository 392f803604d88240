// Bytes moved as vectors of 16, 8, 4, 2 or 1: the widest that every address of a launch allows.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace sdvg {

template <class Vec>
__host__ __device__ __forceinline__ Vec load(const uint8_t* from) {
#ifdef __CUDA_ARCH__
  return *reinterpret_cast<const Vec*>(from);
#else
  Vec vec;
  std::memcpy(&vec, from, sizeof vec);
  return vec;
#endif
}

template <class Vec>
__host__ __device__ __forceinline__ void store(uint8_t* to, Vec vec) {
#ifdef __CUDA_ARCH__
  *reinterpret_cast<Vec*>(to) = vec;
#else
  std::memcpy(to, &vec, sizeof vec);
#endif
}

// the same for bytes that nobody reads again soon: they leave the caches first (ld.cs, st.cs)
template <class Vec>
__host__ __device__ __forceinline__ Vec load_once(const uint8_t* from) {
#ifdef __CUDA_ARCH__
  return __ldcs(reinterpret_cast<const Vec*>(from));
#else
  return load<Vec>(from);
#endif
}

template <class Vec>
__host__ __device__ __forceinline__ void store_once(uint8_t* to, Vec vec) {
#ifdef __CUDA_ARCH__
  __stcs(reinterpret_cast<Vec*>(to), vec);
#else
  store(to, vec);
#endif
}

// copies to shared memory without a register between; `wait_for_copies` before the barrier
template <class Vec>
__host__ __device__ __forceinline__ void copy_to_shared(Vec* to, const uint8_t* from) {
#ifdef __CUDA_ARCH__
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (sizeof(Vec) == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from));
  else if constexpr (sizeof(Vec) >= 4)
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from),
                 "n"(sizeof(Vec)));
  else
    *to = load<Vec>(from);
#else
  *to = load<Vec>(from);
#endif
}

__host__ __device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// collects addresses and distances in bytes; `width` divides all of them
class Alignment {
 public:
  void add(const void* pointer) { bits_ |= reinterpret_cast<uintptr_t>(pointer); }
  void add(int64_t bytes) { bits_ |= static_cast<uintptr_t>(bytes); }
  uint32_t width() const { return 1u << std::countr_zero(bits_ | 16); }

 private:
  uintptr_t bits_ = 0;
};

// calls f(Vec{}) with the vector type of `width` bytes
template <class F>
__host__ __device__ __forceinline__ void with_vector(uint32_t width, F&& f) {
  switch (width) {
    case 16:
      return f(uint4{});
    case 8:
      return f(uint2{});
    case 4:
      return f(static_cast<unsigned int>(0));
    case 2:
      return f(static_cast<unsigned short>(0));
    default:
      return f(static_cast<unsigned char>(0));
  }
}

}  // namespace sdvg
