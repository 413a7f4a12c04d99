// Dropout on what LoRA's A multiplies: x of gate and up (one mask for both), h of down.
//
// Each element is dropped with probability p on its own. The mask is a function of (seed, token, expert, site, element) alone: no state,
// so whoever knows the seed gets the same mask again: the backward, a recomputed forward, any number of threads.
// Survivors are not scaled here: 1 / (1 - p) goes into LoRA's scaling in fp32, so that dropped activations stay exact.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/bf16.h"

namespace ktmoe {

class Dropout {
 public:
  enum Site : std::uint64_t { kX = 1, kH = 2 };

  Dropout() = default;
  // 0 <= p < 1, in steps of 2^-16.
  Dropout(double p, std::uint64_t seed) : threshold_(static_cast<std::uint32_t>(std::lround(p * kSteps))), seed_(seed) {
    if (threshold_ == kSteps) --threshold_;
  }

  explicit operator bool() const { return threshold_ > 0; }
  float factor() const { return static_cast<float>(kSteps) / static_cast<float>(kSteps - threshold_); }

  // The mask of one row; `token` counts in the whole call.
  class Row {
   public:
    // element(j) = 0 where j is dropped, j in [first, first + n); first is a multiple of 4.
    template <class T>
    void apply(T* element, int first, int n) const {
      for (int j = 0; j < n; j += 4) {
        const std::uint64_t bits = mixed(key_ + static_cast<std::uint64_t>((first + j) / 4));
        for (int i = 0; i < 4 && j + i < n; ++i)
          if ((bits >> 16 * i & 0xffff) < threshold_) element[j + i] = T{};
      }
    }

   private:
    friend class Dropout;
    Row(std::uint64_t key, std::uint32_t threshold) : key_(key), threshold_(threshold) {}
    std::uint64_t key_;
    std::uint32_t threshold_;
  };
  Row row(Site site, int token, int expert) const {
    const std::uint64_t place = static_cast<std::uint64_t>(token) << 18 | static_cast<std::uint64_t>(expert) << 2 | site;
    return {mixed(mixed(seed_) ^ mixed(place)), threshold_};
  }

 private:
  static constexpr std::uint32_t kSteps = 1 << 16;

  // A bijection of 64 bits whose outputs for consecutive inputs look independent (the finaliser of SplitMix64).
  static std::uint64_t mixed(std::uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }

  std::uint32_t threshold_ = 0;
  std::uint64_t seed_ = 0;
};

}  // namespace ktmoe
