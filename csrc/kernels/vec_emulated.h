// Vec of the AMX level, emulated: what vec_avx512.h and vec_vnni.h add to the portable one, so that the operands that AMX takes, and the
// order in which it reads, are tested on any CPU. Include after vec_portable.h.

struct EmulatedVec : Vec {
  static constexpr bool kVnni = true;
  static constexpr bool kInOrder = false;
  static constexpr int kTiles = 2;

  static I xor_i(I a, std::int32_t mask) {
    return each_i([&](int i) { return a.v[i] ^ mask; });
  }
  static I dpbusd(I acc, I u8, I s8) {
    return each_i([&](int i) {
      auto product = [&](int byte) { return (u8.v[i] >> 8 * byte & 255) * static_cast<std::int8_t>(s8.v[i] >> 8 * byte); };
      return acc.v[i] + product(0) + product(1) + product(2) + product(3);
    });
  }
};
