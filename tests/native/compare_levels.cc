// Every kernel of every level that this CPU can run, against the portable level, without Python: for CPU emulators and bare machines.
//
//   g++ -std=c++20 -O2 -static -Icsrc -ffp-contract=off -fno-strict-aliasing tests/native/compare_levels.cc
//       csrc/base/*.cc csrc/format/*.cc csrc/kernels/*.cc csrc/kernels/targets/*.cc -o compare_levels
//
// Packed bytes, int8 results and elementwise kernels must agree bit for bit, bf16 sums within their rounding. Exit status 1 on a
// difference.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "base/aligned_buffer.h"
#include "kernels/kernel_api.h"
#include "moe/repack.h"

using namespace ktmoe;

namespace {

int failures = 0, checks = 0;
std::mt19937 random_bits(12345);

float normal() {
  return std::normal_distribution<float>()(random_bits);
}
std::vector<bf16> normals(int n) {
  std::vector<bf16> v(static_cast<std::size_t>(n));
  for (bf16& x : v) x = to_bf16(normal());
  return v;
}

void expect(bool holds, const char* level, const std::string& what) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("DIFFERENT %s: %s\n", level, what.c_str());
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}
// Within k roundings of sums whose terms are about 1 in size.
bool close(const std::vector<float>& a, const std::vector<float>& b, int k) {
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) worst = std::max(worst, static_cast<double>(std::fabs(a[i] - b[i])));
  return worst <= (k + 8) * 1.2e-7 * 4 * std::sqrt(k + 1.0);
}

// The m valid rows of n C blocks.
std::vector<float> valid(const std::vector<float>& c, int m, int n) {
  std::vector<float> rows;
  for (int b = 0; b < n; ++b) {
    const float* block = c.data() + static_cast<std::size_t>(b) * c_block_floats(m);
    rows.insert(rows.end(), block, block + m * kPanelColumns);
  }
  return rows;
}

struct Results {
  std::vector<std::uint8_t> packed;
  std::vector<std::int8_t> x8;
  std::vector<float> scale, forward, backward, outer, combined;
  std::vector<bf16> h, gradient;
  std::vector<float> dot, biased;
};
const Activation kActivations[] = {
    {}, {Activation::silu, 2.0f}, {Activation::oai, 3.0f, 1.702f}, {Activation::gelu_tanh}, {Activation::relu2}};

// Random published weights of about 1 in size: random codes, and small scales where the formats have them.
std::vector<std::byte> raw_part(WeightFormat format, const RawPart& part, int which, int n, int kk) {
  std::vector<std::byte> bytes(raw_row_bytes(part, kk) * static_cast<std::size_t>(n));
  for (std::byte& b : bytes) b = static_cast<std::byte>(random_bits() & (format == WeightFormat::fp8 ? 0xb7 : 0xff));
  const bool k_quant = part.block == 256;
  std::vector<std::size_t> halves;  // where a block has f16 numbers
  if (k_quant) halves = format == WeightFormat::q6_k ? std::vector<std::size_t>{208} : std::vector<std::size_t>{0, 2};
  if (part.block == 32 && which == 0 && part.bytes > 17) halves = {0};
  for (std::size_t at = 0; at < bytes.size(); at += static_cast<std::size_t>(part.bytes)) {
    if (which == 2) bytes[at] &= std::byte{15};  // zero points
    if (format == WeightFormat::mxfp4) bytes[at] = static_cast<std::byte>(124 + random_bits() % 4);
    for (std::size_t half : halves) bytes[at + half + 1] = std::byte{static_cast<unsigned char>(k_quant ? 0x10 : 0x20)};
    if (which == 1 && part.bytes == 2) bytes[at + 1] = std::byte{0x3d};
    const float scale = 0.003f;
    if (which == 1 && part.bytes == 4) std::memcpy(&bytes[at], &scale, 4);
  }
  return bytes;
}

Results run(const KernelTable& k, WeightFormat format, int m, int n, int kk) {
  random_bits.seed(7);
  const FormatInfo& info = format_info(format);
  const PackedLayout layout = PackedLayout::plain(format, n, kk);
  const std::vector<bf16> w = normals(n * kk), x = normals(m * kk), dy = normals(m * n);
  Results r;

  AlignedBuffer packed(layout.bytes);
  if (info.published()) {
    std::vector<std::byte> parts[kMostRawParts];
    RawBlock raw{};
    for (int i = 0; i < info.n_parts(); ++i) {
      parts[i] = raw_part(format, info.parts[i], i, n, kk);
      raw.part[i] = parts[i].data();
    }
    repack_matrix(
        layout, 0, layout.n_panels, [&](int p, int t) { return RawRows{"w", raw, p * kPanelColumns + t * kTileColumns, n}; },
        packed.data());
  }
  for (int p = 0; p < layout.n_panels && !info.published(); ++p)
    for (int t = 0; t < 2; ++t) {
      const int first = p * kPanelColumns + t * kTileColumns, rows = std::clamp(n - first, 0, kTileColumns);
      const bf16* src = w.data() + (rows ? first * kk : 0);
      float scale[kTileColumns] = {};
      if (info.has_scales) k.row_scales(format, src, kk, rows, kk, scale);
      if (info.has_scales)
        std::memcpy(
            packed.data() + layout.panel_stride * static_cast<std::size_t>(layout.n_panels) + static_cast<std::size_t>(p * 32 + t * 16) * 4,
            scale, 64);
      for (int s = 0; s < layout.k_steps; ++s)
        k.pack_tile(format, src + s * info.k_step, kk, rows, std::min(info.k_step, kk - s * info.k_step), scale,
                    packed.data() + layout.panel_stride * static_cast<std::size_t>(p) + (2 * s + t) * info.tile_bytes);
    }
  r.packed.assign(packed.as<std::uint8_t>(), packed.as<std::uint8_t>() + layout.bytes);
  if (info.from_floats) {
    const int blocks = 21;
    std::vector<float> floats(static_cast<std::size_t>(blocks * info.block));
    for (float& v : floats) v = normal();
    std::vector<std::byte> parts[kMostRawParts];
    std::byte* to[kMostRawParts] = {};
    for (int i = 0; i < info.n_parts(); ++i) {
      parts[i].resize(raw_row_bytes(info.parts[i], blocks * info.block));
      to[i] = parts[i].data();
    }
    k.quantize_blocks(format, floats.data(), blocks, to);
    for (const auto& part : parts)
      for (std::byte b : part) r.packed.push_back(static_cast<std::uint8_t>(b));
  }
  const PackedMatrix matrix(layout, packed.data());

  const int ld = layout.k_padded();
  r.x8.resize(static_cast<std::size_t>(m * ld));
  r.scale.resize(static_cast<std::size_t>(m));
  k.quantize_rows({x.data(), kk, nullptr}, m, kk, r.x8.data(), ld, r.scale.data());

  AlignedBuffer operand(k.operand_bytes(format, m, kk));
  if (layout.direct() == WeightFormat::int8)
    k.pack_operand(format, {r.x8.data(), ld, nullptr}, r.scale.data(), m, kk, operand.data());
  else
    k.pack_operand(format, {x.data(), kk, nullptr}, nullptr, m, kk, operand.data());
  std::vector<float> c(c_block_floats(m) * static_cast<std::size_t>(layout.n_panels));
  k.forward(operand.data(), m, matrix, 0, layout.n_panels, c.data(), nullptr, nullptr);
  r.forward = valid(c, m, layout.n_panels);
  const int pairs = layout.n_panels;
  random_bits.seed(9);
  for (float& v : c) v = normal() * 3;
  std::vector<float> bias(static_cast<std::size_t>(32 * pairs));
  for (float& v : bias) v = normal();
  k.add_bias(c.data(), m, pairs, bias.data());
  r.biased = valid(c, m, pairs);
  r.dot.assign(static_cast<std::size_t>(m), 0.0f);
  std::vector<float> weight(static_cast<std::size_t>(m), 0.37f);
  for (const Activation& a : kActivations) {
    const int h = a.h_per_panel() * pairs;
    std::vector<bf16> act(static_cast<std::size_t>(m * h)), gate_up(static_cast<std::size_t>(m * 32 * pairs)), grad(gate_up.size());
    k.activate(a, c.data(), m, pairs, act.data(), h, gate_up.data(), 32 * pairs);
    r.h.insert(r.h.end(), act.begin(), act.end());
    k.activate_backward(a, c.data(), m, pairs, gate_up.data(), 32 * pairs, weight.data(), grad.data(), 32 * pairs, act.data(), h,
                        r.dot.data());
    for (const auto& values : {act, gate_up, grad}) r.gradient.insert(r.gradient.end(), values.begin(), values.end());
  }
  std::vector<float> v(static_cast<std::size_t>(round_up(n, 16)), 0.5f);
  k.dot_rows({dy.data(), n, nullptr}, m, v.data(), n, r.dot.data());

  AlignedBuffer grad(k.grad_operand_bytes(m, layout.n_panels));
  k.pack_grad_operand({dy.data(), n, nullptr}, info.has_scales ? matrix.scales() : nullptr, m, n, layout.n_panels, grad.data());
  const int blocks = layout.k_steps * info.k_step / 32;
  std::vector<float> dx(c_block_floats(m) * static_cast<std::size_t>(blocks), 0.0f);
  k.backward(grad.data(), m, matrix, 0, layout.k_steps, dx.data(), false);
  k.backward(grad.data(), m, matrix, 0, layout.k_steps, dx.data(), true);
  r.backward = valid(dx, m, blocks);

  const int columns = std::min(n, 20), tiles = kk / 16;
  AlignedBuffer p_operand(k.outer_operand_bytes(m, columns));
  k.pack_outer_operand(dy.data(), n, m, columns, p_operand.data());
  r.outer.assign(static_cast<std::size_t>(columns * std::max(tiles, 1) * 16), 0.25f);
  if (tiles) k.outer(p_operand.data(), m, columns, {x.data(), kk, nullptr}, 16, tiles, r.outer.data(), 16 * tiles, true);

  std::vector<float> rows(static_cast<std::size_t>(m) * 64);
  for (float& v : rows) v = normal();
  const std::int32_t row_of[3] = {m - 1, -1, 0};
  const float slot_weight[3] = {0.5f, 1.0f, 0.3f};
  r.combined.resize(64);
  k.combine(rows.data(), 64, row_of, slot_weight, 3, 64, r.combined.data());
  return r;
}

void compare(Isa isa, WeightFormat format, int m, int n, int k) {
  const char* level = isa_name(isa).data();
  const Results a = run(kernels_for(Isa::portable), format, m, n, k), b = run(kernels_for(isa), format, m, n, k);
  const std::string at =
      std::string(format_info(format).name) + " m " + std::to_string(m) + " n " + std::to_string(n) + " k " + std::to_string(k);
  const bool exact = format_info(format).direct == WeightFormat::int8, published = format_info(format).published();
  auto relative = [](const std::vector<float>& x, const std::vector<float>& y) {  // squared
    double off = 0, size = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      off += std::pow(x[i] - y[i], 2.0);
      size += std::pow(x[i], 2.0);
    }
    return size > 0 ? off / size : off;
  };
  expect(same_bits(a.packed, b.packed), level, "packed bytes, " + at);
  expect(same_bits(a.x8, b.x8) && same_bits(a.scale, b.scale), level, "quantize_rows, " + at);
  // Block formats: tile kernels round the weights to bf16, vector kernels the activations of up to 16 rows to int8 (the portable
  // level neither). dY is rounded to bf16 once the weights' scales are in it.
  const bool forward = exact       ? same_bits(a.forward, b.forward)
                       : published ? relative(a.forward, b.forward) <= (m <= 16 ? 4e-4 : 1.6e-5)
                                   : close(a.forward, b.forward, k);
  expect(forward, level, "forward, " + at);
  expect(relative(a.backward, b.backward) <= (exact ? 1e-4 : 1e-10), level, "backward, " + at);
  expect(close(a.outer, b.outer, m), level, "outer, " + at);
  expect(same_bits(a.biased, b.biased), level, "add_bias, " + at);
  expect(same_bits(a.h, b.h), level, "activate, " + at);
  expect(same_bits(a.gradient, b.gradient) && same_bits(a.dot, b.dot), level, "activate_backward and dot_rows, " + at);
  expect(same_bits(a.combined, b.combined), level, "combine, " + at);
}

}  // namespace

int main() {
  for (Isa isa : isa_levels(true)) {
    const int before = failures;
    for (WeightFormat format : all_formats())
      for (int m : {1, 2, 3, 7, 12, 13, 17, 33, 50})
        for (auto [n, k] : {std::pair{32, 64}, {50, 100}, {97, 33}, {16, 160}}) compare(isa, format, m, n, k);
    std::printf("%-14s %s\n", isa_name(isa).data(), failures == before ? "agrees" : "DIFFERS");
  }
  std::printf("%d checks, %d differences\n", checks, failures);
  return failures != 0;
}
