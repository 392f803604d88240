// Stage, commit, rollback, compact and select: key/value caches changed in place, all layers in one
// launch.
//
// A cache is a ring after a sink: token t is in slot t if t < sink, else sink + (t - sink) % (S -
// sink). Rows are moved as bytes, whatever the dtype. Lengths and decisions are read on the device.
// The layers' pointers travel in the launch's parameters: nothing is uploaded, and a captured graph
// replays.
//
// Copies are bound by memory. An H200 needs 25 KB on their way in each multiprocessor (4.8 TB/s x
// 700 ns / 132): a thread has kUnroll loads of up to 16 bytes on their way before its first store,
// and with 64 registers a multiprocessor has 1024 threads, 64 KB. A piece is 16 KiB, so that even
// one layer of a small block fills the machine. Decisions are read first, together; new rows are
// loaded before the length that says where they go is there. What is read once, and what only a
// rollback would read, leaves the caches first: the K and V that attention reads next stay.

#include "caches.cuh"
#include "lanes.cuh"
#include "vec.cuh"

namespace sdvg {
namespace {

constexpr uint32_t kUnroll = 4;

// --- kernels ---

// The pieces of all sequences go round the blocks in turn: the first of sequence i that `block`
// has. A grid that fills the machine once, and no more: where all is accepted, a block per piece
// would cost as long as 50 thousand blocks take to come and go
__host__ __device__ inline uint32_t first_piece(uint32_t i, uint32_t pieces, uint32_t block,
                                                uint32_t blocks) {
  const uint32_t before = static_cast<uint32_t>(static_cast<uint64_t>(i) * pieces % blocks);
  return block >= before ? block - before : block + blocks - before;
}

// cache[b, length + t] = rows[i, t], where accept[i] is not set; what was there goes to saved[i, t]
// grid: (blocks); a piece is one of a sequence's tiles of one layer's K or V
// budget: MoveRows registers 64 (four blocks on a multiprocessor)
template <class Vec>
struct MoveRows {
  static constexpr int kPhases = 1;

  Rows cache[2], rows[2], saved[2];
  Sequences sequences;
  Ring ring;
  const bool* accept;  // null: none is
  bool save;
  uint32_t size;  // b
  uint32_t row_vectors;
  uint32_t vectors;  // of a sequence's rows
  uint32_t tiles;    // of them
  uint32_t pieces;   // of a sequence
  uint32_t blocks;

  template <int>
  __host__ __device__ void phase(Place at, uint8_t*) const {
    for (uint32_t i = 0; i < size; ++i) {
      if (accept != nullptr && accept[i]) continue;
      const int64_t b = sequences[i];
      const int32_t length = sequences.lengths[b];
      uint32_t piece = first_piece(i, pieces, at.block.x, blocks);
      for (; piece < pieces; piece += blocks) {
        const uint32_t layer = piece / tiles;
        move(i, b, length, layer >> 1, layer & 1, piece % tiles * (kThreads * kUnroll) + at.thread);
      }
    }
  }

  __host__ __device__ void move(uint32_t i, int64_t b, int32_t length, uint32_t layer,
                                uint32_t side, uint32_t first) const {
    Vec fresh[kUnroll], old[kUnroll];
    uint32_t row[kUnroll], byte[kUnroll];
    uint8_t* target[kUnroll];
#pragma unroll
    for (uint32_t j = 0; j < kUnroll; ++j) {
      const uint32_t v = first + j * kThreads;
      row[j] = v / row_vectors;
      byte[j] = v % row_vectors * sizeof(Vec);
      if (v < vectors) fresh[j] = load_once<Vec>(rows[side].row(layer, i, row[j]) + byte[j]);
    }
    const int32_t start = ring.start(length);
#pragma unroll
    for (uint32_t j = 0; j < kUnroll; ++j)
      target[j] =
          cache[side].row(layer, b, ring.wrap(start + static_cast<int32_t>(row[j]))) + byte[j];
    if (save) {
#pragma unroll
      for (uint32_t j = 0; j < kUnroll; ++j)
        if (first + j * kThreads < vectors) old[j] = load<Vec>(target[j]);
#pragma unroll
      for (uint32_t j = 0; j < kUnroll; ++j)
        if (first + j * kThreads < vectors)
          store_once(saved[side].row(layer, i, row[j]) + byte[j], old[j]);
    }
#pragma unroll
    for (uint32_t j = 0; j < kUnroll; ++j)
      if (first + j * kThreads < vectors) store(target[j], fresh[j]);
  }
};

// cache[b, length + p] = cache[b, length + path[i, p]]: a block owns some columns of all rows of a
// sequence's path, and reads every one into shared memory before it writes any. The reads need no
// registers: all of a block's are on their way at once
// grid: (tiles of columns, sequences, layers x {K, V})
// budget: CompactRows registers 64 (four blocks on a multiprocessor)
template <class Vec>
struct CompactRows {
  static constexpr int kPhases = 2;

  Rows cache[2];
  Sequences sequences;
  Ring ring;
  const int32_t* path;
  int64_t path_stride;
  uint32_t path_length;
  uint32_t row_vectors;
  uint32_t columns_log2;  // of a block

  template <int kPhase>
  __host__ __device__ void phase(Place at, uint8_t* shared) const {
    const uint32_t i = at.block.y, layer = at.block.z >> 1, side = at.block.z & 1;
    const int64_t b = sequences[i];
    const int32_t start = ring.start(sequences.lengths[b]);
    Vec* const staged = reinterpret_cast<Vec*>(shared);
    const uint32_t size = path_length << columns_log2, mask = (1u << columns_log2) - 1;
    for (uint32_t first = at.thread; first < size; first += kThreads * kUnroll) {
      int32_t from[kUnroll];
#pragma unroll
      for (uint32_t j = 0; j < kUnroll; ++j) {
        const uint32_t e = first + j * kThreads;
        from[j] = e < size ? path[i * path_stride + (e >> columns_log2)] : -1;
      }
      Vec vec[kUnroll];
      uint8_t* place[kUnroll];
#pragma unroll
      for (uint32_t j = 0; j < kUnroll; ++j) {
        const uint32_t e = first + j * kThreads;
        const uint32_t column = (at.block.x << columns_log2) + (e & mask);
        const int32_t p = static_cast<int32_t>(e >> columns_log2);
        SDVG_DEVICE_CHECK(from[j] < ring.size, "path must stay within the ring");
        // a row that stays where it is
        const bool moves = from[j] >= 0 && from[j] != p && column < row_vectors;
        const int32_t t = ring.wrap(start + (kPhase == 0 ? from[j] : p));
        place[j] = moves ? cache[side].row(layer, b, t) + column * sizeof(Vec) : nullptr;
        if constexpr (kPhase == 1)
          if (moves) vec[j] = staged[e];
      }
#pragma unroll
      for (uint32_t j = 0; j < kUnroll; ++j) {
        if (place[j] == nullptr) continue;
        if constexpr (kPhase == 0)
          copy_to_shared(staged + first + j * kThreads, place[j]);
        else
          store(place[j], vec[j]);
      }
    }
    if constexpr (kPhase == 0) wait_for_copies();
  }
};

// lengths[b] += count where accept[i]; one thread a sequence
// budget: Advance registers 64
struct Advance {
  static constexpr int kPhases = 1;

  Sequences sequences;
  const bool* accept;
  int32_t count;
  uint32_t size;  // b

  template <int>
  __host__ __device__ void phase(Place at, uint8_t*) const {
    const uint32_t i = at.block.x * kThreads + at.thread;
    if (i < size && accept[i]) sequences.lengths[sequences[i]] += count;
  }
};

// lengths[b] += the entries of path[i] before its first -1: one thread an entry, and the last valid
// one knows how many there are
// grid: (tiles of a path's entries, sequences)
// budget: AdvanceAlong registers 64
struct AdvanceAlong {
  static constexpr int kPhases = 1;

  Sequences sequences;
  const int32_t* path;
  int64_t path_stride;
  uint32_t path_length;

  template <int>
  __host__ __device__ void phase(Place at, uint8_t*) const {
    const uint32_t i = at.block.y, p = at.block.x * kThreads + at.thread;
    if (p >= path_length) return;
    const int32_t* const entry = path + i * path_stride + p;
    const bool valid = entry[0] >= 0, more = p + 1 < path_length && entry[1] >= 0;
    SDVG_DEVICE_CHECK(valid || !more, "path must have -1 at its end only");
    if (valid && !more) sequences.lengths[sequences[i]] += static_cast<int32_t>(p) + 1;
  }
};

// draft[n][b] = other[n][b] where accept[b] is not set
// grid: (blocks); a piece is one of the tiles of all tensors' rows
// budget: SelectRows registers 64 (four blocks on a multiprocessor)
struct SelectRows {
  static constexpr int kPhases = 1;

  struct Item {
    uint8_t* draft;
    const uint8_t* other;
    int64_t draft_stride, other_stride;  // of a sequence, in bytes
    int64_t vectors;                     // of a row
    uint32_t width;                      // bytes of a vector
    uint32_t first_tile;
  };
  Item item[kLayers];
  int items;
  const bool* accept;
  uint32_t size;    // B
  uint32_t pieces;  // of a sequence
  uint32_t blocks;

  template <int>
  __host__ __device__ void phase(Place at, uint8_t*) const {
    for (uint32_t b = 0; b < size; ++b) {
      if (accept[b]) continue;
      uint32_t piece = first_piece(b, pieces, at.block.x, blocks);
      for (; piece < pieces; piece += blocks) take(b, piece, at.thread);
    }
  }

  __host__ __device__ void take(uint32_t b, uint32_t piece, uint32_t thread) const {
    int low = 0;
    for (int high = items; high - low > 1;) {
      const int middle = (low + high) / 2;
      (item[middle].first_tile <= piece ? low : high) = middle;
    }
    const Item& it = item[low];
    uint8_t* const draft = it.draft + b * it.draft_stride;
    const uint8_t* const other = it.other + b * it.other_stride;
    const int64_t first =
        static_cast<int64_t>(piece - it.first_tile) * (kThreads * kUnroll) + thread;
    with_vector(it.width, [&]<class Vec>(Vec) {
      Vec taken[kUnroll];
#pragma unroll
      for (uint32_t j = 0; j < kUnroll; ++j)
        if (const int64_t v = first + j * kThreads; v < it.vectors)
          taken[j] = load_once<Vec>(other + v * sizeof(Vec));
#pragma unroll
      for (uint32_t j = 0; j < kUnroll; ++j)
        if (const int64_t v = first + j * kThreads; v < it.vectors)
          store(draft + v * sizeof(Vec), taken[j]);
    });
  }
};

// --- launchers ---

uint32_t tiles(int64_t vectors) {
  return static_cast<uint32_t>((vectors + kThreads * kUnroll - 1) / (kThreads * kUnroll));
}

template <Lane kLane>
void move_rows(const char* op, const Tensors (&cache_tensors)[2], const Tensors (&row_tensors)[2],
               const Tensors (&saved_tensors)[2], const Tensor& lengths,
               const std::optional<Tensor>& batch_idx, const Tensor* accept, int64_t sink) {
  const Layers cache[2] = {{op, "k_cache", cache_tensors[0]}, {op, "v_cache", cache_tensors[1]}};
  const Layers rows[2] = {{op, "key", row_tensors[0]}, {op, "value", row_tensors[1]}};
  const bool save = !saved_tensors[0].empty();
  const Sequences sequences = sequences_of(op, lengths, batch_idx);
  const Ring ring = ring_of(op, cache[0], sink);
  const int64_t b = batch_idx ? batch_idx->size(0) : sequences.count, t = rows[0].t;
  const size_t layers = cache[0].layer.size();
  check_alike(op, "v_cache", cache[1], cache[0], true);
  check_alike(op, "value", rows[1], rows[0], true);
  SDVG_CHECK(cache[0].b == sequences.count, op, "lengths must be [B] with B = ", cache[0].b);
  SDVG_CHECK(rows[0].layer.size() == layers && rows[0].b == b &&
                 rows[0].row_bytes == cache[0].row_bytes && t <= ring.size,
             op, "key must be [layers, b, T, H, D] as the cache, with T at most ", ring.size);

  Alignment alignment;
  std::vector<Layers> saved;
  for (int side = 0; side < 2; ++side) {
    cache[side].add_to(alignment);
    rows[side].add_to(alignment);
    if (!save) continue;
    saved.emplace_back(op, "undo", saved_tensors[side]);
    check_alike(op, "undo", saved[side], rows[side], true);
    saved[side].add_to(alignment);
  }
  if (b * t * rows[0].row_bytes == 0) return;
  with_vector(alignment.width(), [&]<class Vec>(Vec) {
    MoveRows<Vec> kernel{.sequences = sequences,
                         .ring = ring,
                         .accept = accept ? accept_of(op, *accept, b) : nullptr,
                         .save = save};
    const int64_t row_vectors = rows[0].row_bytes / static_cast<int64_t>(sizeof(Vec));
    SDVG_CHECK(row_vectors * t < INT32_MAX, op, "key must have fewer than 2^31 vectors a sequence");
    kernel.row_vectors = static_cast<uint32_t>(row_vectors);
    kernel.vectors = static_cast<uint32_t>(row_vectors * t);
    kernel.tiles = tiles(kernel.vectors);
    kernel.size = static_cast<uint32_t>(b);
    const int64_t blocks = resident_blocks<kLane>(lengths);
    for (size_t first = 0; first < layers; first += kLayers) {
      const size_t count = std::min<size_t>(kLayers, layers - first);
      for (int side = 0; side < 2; ++side) {
        kernel.cache[side] = cache[side].rows(first, count);
        kernel.rows[side] = rows[side].rows(first, count);
        if (save) kernel.saved[side] = saved[side].rows(first, count);
      }
      kernel.pieces = kernel.tiles * static_cast<uint32_t>(2 * count);
      kernel.blocks = std::min<int64_t>(b * kernel.pieces, blocks);
      launch<kLane>(op, kernel, dim3(kernel.blocks), 0, lengths);
    }
  });
}

template <Lane kLane>
void stage_(Tensors k_cache, Tensors v_cache, Tensors key, Tensors value, Tensor lengths,
            std::optional<Tensor> batch_idx, Tensors undo_k, Tensors undo_v, int64_t sink) {
  move_rows<kLane>("stage_", {k_cache, v_cache}, {key, value}, {undo_k, undo_v}, lengths, batch_idx,
                   nullptr, sink);
}

template <Lane kLane>
void rollback_(Tensors k_cache, Tensors v_cache, Tensor lengths, Tensor accept, Tensors undo_k,
               Tensors undo_v, std::optional<Tensor> batch_idx, int64_t sink) {
  move_rows<kLane>("rollback_", {k_cache, v_cache}, {undo_k, undo_v}, {}, lengths, batch_idx,
                   &accept, sink);
}

template <Lane kLane>
void commit_(Tensor lengths, Tensor accept, std::optional<Tensor> batch_idx, int64_t count) {
  const char* const op = "commit_";
  const Sequences sequences = sequences_of(op, lengths, batch_idx);
  const int64_t b = batch_idx ? batch_idx->size(0) : sequences.count;
  SDVG_CHECK(0 <= count && count <= INT32_MAX, op, "count must fit in int32, got ", count);
  const Advance kernel{.sequences = sequences,
                       .accept = accept_of(op, accept, b),
                       .count = static_cast<int32_t>(count),
                       .size = static_cast<uint32_t>(b)};
  if (b) launch<kLane>(op, kernel, dim3((b + kThreads - 1) / kThreads), 0, lengths);
}

template <Lane kLane>
void compact_(Tensors k_cache, Tensors v_cache, Tensor lengths, Tensor path,
              std::optional<Tensor> batch_idx, int64_t sink) {
  const char* const op = "compact_";
  const Layers cache[2] = {{op, "k_cache", k_cache}, {op, "v_cache", v_cache}};
  check_alike(op, "v_cache", cache[1], cache[0], true);
  const Sequences sequences = sequences_of(op, lengths, batch_idx);
  const Ring ring = ring_of(op, cache[0], sink);
  const int64_t b = batch_idx ? batch_idx->size(0) : sequences.count;
  SDVG_CHECK(cache[0].b == sequences.count, op, "lengths must be [B] with B = ", cache[0].b);
  SDVG_CHECK(path.dim() == 2 && path.size(0) == b && path.element_size() == 4 &&
                 path.is_contiguous() && path.size(1) <= ring.size,
             op, "path must be [b, P] int32, contiguous, with P at most ", ring.size);
  const int64_t length = path.size(1), layers = static_cast<int64_t>(cache[0].layer.size());
  if (b * length == 0) return;

  Alignment alignment;
  for (const Layers& side : cache) side.add_to(alignment);
  if (cache[0].row_bytes)
    with_vector(alignment.width(), [&]<class Vec>(Vec) {
      const uint32_t column_bytes = static_cast<uint32_t>(length * sizeof(Vec));
      const uint32_t shared = most_shared_bytes<kLane>(lengths), fit = shared / column_bytes;
      SDVG_CHECK(fit > 0, op, "path must have at most ", shared / sizeof(Vec), " columns");
      CompactRows<Vec> kernel{.sequences = sequences,
                              .ring = ring,
                              .path = int32_of(path),
                              .path_stride = length,
                              .path_length = static_cast<uint32_t>(length)};
      kernel.row_vectors = static_cast<uint32_t>(cache[0].row_bytes / sizeof(Vec));
      // two blocks share a multiprocessor, which keeps 1 KB for each: one reads while one writes. A
      // sector has 32 bytes: for less, a block takes all the memory. A short path takes no more
      // columns than 8 vectors a thread, so that its blocks still fill the machine
      const uint32_t half = (shared - 1024) / 2 / column_bytes;
      const uint32_t sector = std::max<uint32_t>(1, 32 / sizeof(Vec));
      const uint32_t enough = std::max<uint32_t>(128 / sizeof(Vec), 8 * kThreads / length);
      const uint32_t most = std::min(std::max(half, std::min(fit, sector)), enough);
      const uint32_t columns = std::min(std::bit_ceil(kernel.row_vectors), std::bit_floor(most));
      kernel.columns_log2 = std::countr_zero(columns);
      for (int64_t first = 0; first < layers; first += kLayers) {
        const size_t count = std::min<int64_t>(kLayers, layers - first);
        for (int side = 0; side < 2; ++side) kernel.cache[side] = cache[side].rows(first, count);
        const dim3 grid((kernel.row_vectors + columns - 1) / columns, static_cast<uint32_t>(b),
                        static_cast<uint32_t>(2 * count));
        launch<kLane>(op, kernel, grid, columns * length * sizeof(Vec), lengths);
      }
    });
  // a launch of its own: every block above reads the old lengths. One launch would need a count of
  // the blocks that have, in memory that is zero for every stream and every replay of a graph
  const AdvanceAlong advance{.sequences = sequences,
                             .path = int32_of(path),
                             .path_stride = length,
                             .path_length = static_cast<uint32_t>(length)};
  const dim3 grid(static_cast<uint32_t>((length + kThreads - 1) / kThreads),
                  static_cast<uint32_t>(b));
  launch<kLane>(op, advance, grid, 0, lengths);
}

template <Lane kLane>
void select_(Tensor accept, Tensors draft, Tensors other) {
  const char* const op = "select_";
  SDVG_CHECK(draft.size() == other.size(), op, "other must hold as many tensors as draft");
  const int64_t b = accept.size(0);
  SelectRows kernel{.accept = accept_of(op, accept, b), .size = static_cast<uint32_t>(b)};
  uint32_t tile = 0;
  const int64_t blocks = resident_blocks<kLane>(accept);
  const auto flush = [&] {
    kernel.pieces = tile;
    kernel.blocks = std::min<int64_t>(b * tile, blocks);
    if (tile) launch<kLane>(op, kernel, dim3(kernel.blocks), 0, accept);
    kernel.items = 0;
    tile = 0;
  };
  for (size_t n = 0; n < draft.size(); ++n) {
    const Tensor &mine = draft[n], &theirs = other[n];
    SDVG_CHECK(rows_alike(mine, theirs, accept), op,
               "draft and other must be alike, [B, ...] with contiguous rows, and B = ", b);
    if (mine.numel() == 0) continue;
    const int64_t item = static_cast<int64_t>(mine.element_size());
    const int64_t bytes = mine.numel() / b * item;
    SelectRows::Item it{.draft = static_cast<uint8_t*>(mine.data_ptr()),
                        .other = static_cast<const uint8_t*>(theirs.data_ptr()),
                        .draft_stride = b == 1 ? 0 : mine.stride(0) * item,
                        .other_stride = b == 1 ? 0 : theirs.stride(0) * item,
                        .first_tile = tile};
    Alignment alignment;
    alignment.add(it.draft);
    alignment.add(it.other);
    for (const int64_t distance : {it.draft_stride, it.other_stride, bytes})
      alignment.add(distance);
    it.width = alignment.width();
    it.vectors = bytes / it.width;
    kernel.item[kernel.items++] = it;
    tile += tiles(it.vectors);
    if (kernel.items == kLayers) flush();
  }
  flush();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sdvg_kernels, CUDA, library) {
  library.impl("stage_", TORCH_BOX(&stage_<Lane::kDevice>));
  library.impl("commit_", TORCH_BOX(&commit_<Lane::kDevice>));
  library.impl("rollback_", TORCH_BOX(&rollback_<Lane::kDevice>));
  library.impl("compact_", TORCH_BOX(&compact_<Lane::kDevice>));
  library.impl("select_", TORCH_BOX(&select_<Lane::kDevice>));
}

STABLE_TORCH_LIBRARY_IMPL(sdvg_kernels_host, CPU, library) {
  library.impl("stage_", TORCH_BOX(&stage_<Lane::kHost>));
  library.impl("commit_", TORCH_BOX(&commit_<Lane::kHost>));
  library.impl("rollback_", TORCH_BOX(&rollback_<Lane::kHost>));
  library.impl("compact_", TORCH_BOX(&compact_<Lane::kHost>));
  library.impl("select_", TORCH_BOX(&select_<Lane::kHost>));
}

}  // namespace sdvg
