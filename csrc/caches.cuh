// What the cache kernels are told (a ring, sequences, the rows of all layers), and how it is read
// from tensors, whose checks stand here.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "check.h"
#include "vec.cuh"

namespace sdvg {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// layers, or tensors, of one launch: what fits in 4 KiB of parameters; more of them take another
// launch
constexpr int kLayers = 64;

struct Ring {
  int32_t sink;
  int32_t size;  // S - sink

  // slot of token `length + row` is sink + wrap(start(length) + row), for row < size
  __host__ __device__ int32_t start(int32_t length) const {
    SDVG_DEVICE_CHECK(length >= 0, "lengths must be at least 0");
    return length < sink ? length - sink : (length - sink) % size;
  }
  __host__ __device__ int32_t wrap(int32_t place) const {
    return sink + (place >= size ? place - size : place);
  }
};

// which sequences a launch is about, and their lengths
struct Sequences {
  int32_t* lengths;
  const void* batch_idx;  // null: all in order
  bool wide;              // batch_idx is int64
  int64_t count;          // B

  __host__ __device__ int64_t operator[](uint32_t i) const {
    if (batch_idx == nullptr) return i;
    const int64_t b = wide ? static_cast<const int64_t*>(batch_idx)[i]
                           : static_cast<const int32_t*>(batch_idx)[i];
    SDVG_DEVICE_CHECK(b >= 0 && b < count, "batch_idx must name sequences of the cache");
    return b;
  }
};

// rows [b, t] of every layer; strides in bytes
struct Rows {
  uint8_t* layer[kLayers];
  int64_t stride_b;
  int64_t stride_t;

  __host__ __device__ uint8_t* row(uint32_t i_layer, int64_t b, int64_t t) const {
    return layer[i_layer] + b * stride_b + t * stride_t;
  }
};

// one tensor [layers, b, T, H, D], or one [b, T, H, D] per layer
struct Layers {
  std::vector<uint8_t*> layer;
  int64_t b, t, row_bytes, stride_b, stride_t;

  Layers(const char* op, const char* name, const Tensors& tensors) {
    SDVG_CHECK(!tensors.empty(), op, name, " must hold at least one tensor");
    const Tensor& first = tensors[0];
    const int64_t item = static_cast<int64_t>(first.element_size()), dims = first.dim();
    SDVG_CHECK(dims == 4 || (dims == 5 && tensors.size() == 1), op, name,
               " must be one [layers, B, S, H, D] or one [B, S, H, D] per layer");
    const int64_t heads = first.size(dims - 2), width = first.size(dims - 1);
    SDVG_CHECK((width == 1 || first.stride(dims - 1) == 1) &&
                   (heads == 1 || first.stride(dims - 2) == width),
               op, name, " must have contiguous [H, D]");
    b = first.size(dims - 4);
    t = first.size(dims - 3);
    row_bytes = heads * width * item;
    // the stride of a dimension of size 1 is arbitrary, and would spoil the alignment
    stride_b = b == 1 ? 0 : first.stride(dims - 4) * item;
    stride_t = t == 1 ? 0 : first.stride(dims - 3) * item;
    if (dims == 5) {
      auto* const base = static_cast<uint8_t*>(first.data_ptr());
      const int64_t stride = first.stride(0) * item;
      for (int64_t i = 0; i < first.size(0); ++i) layer.push_back(base + i * stride);
      return;
    }
    const auto sizes = first.sizes(), strides = first.strides();
    const auto dtype = first.scalar_type();
    const int64_t device = first.get_device_index(), cuda = first.is_cuda();
    layer.reserve(tensors.size());
    for (const Tensor& tensor : tensors) {
      const auto own_sizes = tensor.sizes(), own_strides = tensor.strides();
      bool alike = own_sizes.size() == 4 && tensor.scalar_type() == dtype &&
                   tensor.is_cuda() == cuda && tensor.get_device_index() == device;
      for (size_t d = 0; alike && d < 4; ++d)
        alike = own_sizes[d] == sizes[d] && own_strides[d] == strides[d];
      SDVG_CHECK(alike, op, name, " must have layers of one shape, dtype, device and strides");
      layer.push_back(static_cast<uint8_t*>(tensor.data_ptr()));
    }
  }

  void add_to(Alignment& alignment) const {
    for (const uint8_t* pointer : layer) alignment.add(pointer);
    alignment.add(row_bytes);
    alignment.add(stride_b);
    alignment.add(stride_t);
  }

  // layers first .. first + count - 1
  Rows rows(size_t first, size_t count) const {
    Rows rows{.stride_b = stride_b, .stride_t = stride_t};
    std::copy_n(layer.begin() + first, count, rows.layer);
    return rows;
  }
};

inline void check_alike(const char* op, const char* name, const Layers& some, const Layers& like,
                        bool same_tokens) {
  SDVG_CHECK(some.layer.size() == like.layer.size() && some.b == like.b &&
                 some.row_bytes == like.row_bytes && (!same_tokens || some.t == like.t),
             op, name, " must have the layers, sequences, heads and dtype of its like");
}

inline const int32_t* int32_of(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.data_ptr());
}

inline Sequences sequences_of(const char* op, const Tensor& lengths,
                              const std::optional<Tensor>& idx) {
  SDVG_CHECK(lengths.dim() == 1 && lengths.element_size() == 4 && lengths.is_contiguous(), op,
             "lengths must be [B] int32, contiguous");
  if (idx)
    SDVG_CHECK(idx->dim() == 1 && idx->element_size() >= 4 && idx->is_contiguous(), op,
               "batch_idx must be [b] int32 or int64, contiguous");
  return {.lengths = static_cast<int32_t*>(lengths.data_ptr()),
          .batch_idx = idx ? idx->data_ptr() : nullptr,
          .wide = idx && idx->element_size() == 8,
          .count = lengths.size(0)};
}

inline const bool* accept_of(const char* op, const Tensor& accept, int64_t b) {
  SDVG_CHECK(accept.dim() == 1 && accept.size(0) == b && accept.element_size() == 1 &&
                 accept.is_contiguous(),
             op, "accept must be [b] bool, contiguous, with b = ", b);
  return static_cast<const bool*>(accept.data_ptr());
}

inline Ring ring_of(const char* op, const Layers& cache, int64_t sink) {
  SDVG_CHECK(0 <= sink && sink < cache.t && cache.t < INT32_MAX / 2, op,
             "sink must be at least 0 and less than S = ", cache.t);
  return {static_cast<int32_t>(sink), static_cast<int32_t>(cache.t - sink)};
}

// whether both are [B, ...] as `accept` has it, of one shape, dtype and device, with contiguous
// rows of which those of `some` do not overlap
inline bool rows_alike(const Tensor& some, const Tensor& other, const Tensor& accept) {
  const auto sizes = some.sizes();
  bool alike = !sizes.empty() && sizes[0] == accept.size(0) && other.sizes() == sizes &&
               other.scalar_type() == some.scalar_type();
  for (const Tensor* tensor : {&some, &other}) {
    alike = alike && tensor->is_cuda() == accept.is_cuda() &&
            tensor->get_device_index() == accept.get_device_index();
    if (!alike) return false;
    if (tensor->numel() == 0) continue;
    const auto strides = tensor->strides();
    int64_t row = 1;
    for (size_t d = sizes.size() - 1; d > 0; row *= sizes[d], --d)
      alike = alike && (sizes[d] == 1 || strides[d] == row);
    if (tensor == &some) alike = alike && (sizes[0] == 1 || strides[0] >= row);
  }
  return alike;
}

}  // namespace sdvg
