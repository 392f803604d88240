// The host lane's order: in which order the threads of a phase, and the blocks of a grid, run on
// the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace sdvg {

// 0: forward, 1: backward, anything else: shuffled with that seed
inline uint64_t host_order = 0;

class Order {
 public:
  std::vector<uint32_t> of(uint32_t count) {
    std::vector<uint32_t> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (host_order == 1) std::reverse(order.begin(), order.end());
    if (host_order > 1) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

 private:
  std::mt19937_64 random_{host_order};
};

}  // namespace sdvg
