// Vec of the AMX level, emulated: what vec_avx512.h, vec_vnni.h and vec_bf16.h add to the portable one, so that the operands that AMX
// takes, and the order in which it reads, are tested on any CPU. Include after vec_portable.h.

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
  static I cross_pairs(I x) {
    return each_i([&](int i) {
      const std::int32_t low = x.v[i & ~1], high = x.v[i | 1];
      return i % 2 ? (low >> 16 & 0xffff) | (high & ~0xffff) : (low & 0xffff) | (high & 0xffff) << 16;
    });
  }
  template <int N>
  static I shl16(I x) {
    return each_i([&](int i) { return (x.v[i] & (0xffff >> N) * 0x00010001) << N; });
  }
  template <int N>
  static I shr16(I x) {
    return each_i([&](int i) { return x.v[i] >> N & (0xffff >> N) * 0x00010001; });
  }
  static I lookup_bytes128(I index, const std::uint8_t* table) {
    return each_i([&](int i) {
      std::uint32_t bytes = 0;
      for (int b = 0; b < 32; b += 8) bytes |= static_cast<std::uint32_t>(table[index.v[i] >> b & 127]) << b;
      return static_cast<std::int32_t>(bytes);
    });
  }
};
