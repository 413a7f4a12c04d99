// CPU detection: cpuid for the instructions, XGETBV for the registers that the system saves, arch_prctl for the AMX tiles.
#include "base/isa.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "base/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ktmoe {
namespace {

struct Probe {
  CpuReport report;
  bool has(const char* name) const {
    for (const auto& f : report.features)
      if (!std::strcmp(f.name, name)) return f.present;
    return false;
  }
};

#if defined(__x86_64__)
std::uint64_t saved_registers() {
  std::uint32_t lo, hi;
  asm volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (std::uint64_t{hi} << 32) | lo;
}

std::string request_tiles() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtileData = 18;
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0) return "granted";
  return std::string("denied: ") + std::strerror(errno);
}

// AMD's performance hints: bit 0, 128-bit data paths; bit 2, 256-bit ones. Intel has no such leaf.
bool vectors_in_halves() {
  unsigned a, b, c, d;
  return __get_cpuid(0x8000001Au, &a, &b, &c, &d) != 0 && (a & 1) != 0 && (a & 4) == 0;
}

// Family 19h, of which only Zen 4 has AVX-512.
bool family_of_zen4() {
  unsigned a, b, c, d;
  return __builtin_cpu_is("amd") && __get_cpuid(1, &a, &b, &c, &d) != 0 && (a >> 8 & 15) + (a >> 20 & 255) == 0x19;
}

Probe probe() {
  Probe p;
  __builtin_cpu_init();
  unsigned a, b, c, d;
  char brand[49] = {};
  for (unsigned i = 0; i < 3; ++i)
    if (__get_cpuid(0x80000002u + i, &a, &b, &c, &d)) {
      const unsigned regs[4] = {a, b, c, d};
      std::memcpy(brand + 16 * i, regs, 16);
    }
  p.report.model = brand;

  unsigned c1 = 0, b7 = 0, c7 = 0, d7 = 0, a71 = 0;
  if (__get_cpuid(1, &a, &b, &c1, &d) == 0) c1 = 0;
  if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) == 0) b7 = c7 = d7 = 0;
  if (__get_cpuid_count(7, 1, &a71, &b, &c, &d) == 0) a71 = 0;
  const bool osxsave = c1 >> 27 & 1;
  const std::uint64_t saved = osxsave ? saved_registers() : 0;
  const bool ymm = (saved & 0x6) == 0x6, zmm = ymm && (saved & 0xe0) == 0xe0, tmm = zmm && (saved >> 17 & 3) == 3;
  auto add = [&](const char* name, bool bit, bool registers) { p.report.features.push_back({name, bit && registers}); };
  add("avx2", b7 >> 5 & 1, ymm);
  add("fma", c1 >> 12 & 1, ymm);
  add("f16c", c1 >> 29 & 1, ymm);
  add("avxvnni", a71 >> 4 & 1, ymm);
  add("avx512f", b7 >> 16 & 1, zmm);
  add("avx512dq", b7 >> 17 & 1, zmm);
  add("avx512bw", b7 >> 30 & 1, zmm);
  add("avx512vl", b7 >> 31 & 1, zmm);
  add("avx512vbmi", c7 >> 1 & 1, zmm);
  add("avx512vnni", c7 >> 11 & 1, zmm);
  add("avx512bf16", a71 >> 5 & 1, zmm);
  add("fast_avx512bf16", (a71 >> 5 & 1) && __builtin_cpu_is("amd"), zmm);  // twice as fast as fp32 there, half as fast on Intel's
  add("amx_tile", d7 >> 24 & 1, tmm);
  add("amx_bf16", d7 >> 22 & 1, tmm);
  add("amx_int8", d7 >> 25 & 1, tmm);
  p.report.amx_permission = p.has("amx_tile") ? request_tiles() : "no AMX";
  return p;
}
#else
bool vectors_in_halves() {
  return false;
}
bool family_of_zen4() {
  return false;
}

Probe probe() {
  return {{"not x86-64", {}, "no AMX"}};
}
#endif

const Probe& host() {
  static const Probe* const probed = new Probe(probe());  // leaked: may be asked during exit
  return *probed;
}

std::vector<const char*> needs(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi", "avx512bf16", "amx_tile", "amx_bf16", "amx_int8"};
    case Isa::avx512bf16:
      return {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi", "avx512bf16"};
    case Isa::avx512vnni:
      return {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512vnni"};
    case Isa::avx512:
      return {"avx512f", "avx512dq", "avx512bw", "avx512vl"};
    case Isa::avxvnni:
      return {"avx2", "fma", "f16c", "avxvnni"};
    case Isa::avx2:
      return {"avx2", "fma", "f16c"};
    case Isa::portable:
    case Isa::emulated_amx:
      return {};
  }
  return {};
}

bool is_test_level(Isa isa) {
  switch (isa) {
#define KTMOE_ISA(id, name, test_only) \
  case Isa::id:                        \
    return test_only;
#include "base/isas.inc"
#undef KTMOE_ISA
  }
  return false;
}

}  // namespace

const bool avx2_in_halves = vectors_in_halves();
const bool zen4 = family_of_zen4();

const CpuReport& cpu_report() {
  return host().report;
}

std::string_view isa_name(Isa isa) {
  switch (isa) {
#define KTMOE_ISA(id, name, test_only) \
  case Isa::id:                        \
    return name;
#include "base/isas.inc"
#undef KTMOE_ISA
  }
  return "?";
}

std::string isa_missing(Isa isa) {
  std::string missing;
  for (const char* name : needs(isa))
    if (!host().has(name)) missing += (missing.empty() ? "no " : ", ") + std::string(name);
  if (isa == Isa::amx && missing.empty() && host().report.amx_permission != "granted")
    missing = "tile permission " + host().report.amx_permission;
  return missing;
}

bool isa_supported(Isa isa) {
  return isa_missing(isa).empty();
}

std::vector<Isa> all_isas(bool with_test_levels) {
  std::vector<Isa> all;
  for (Isa isa : {
#define KTMOE_ISA(id, name, test_only) Isa::id,
#include "base/isas.inc"
#undef KTMOE_ISA
       })
    if (with_test_levels || !is_test_level(isa)) all.push_back(isa);
  return all;
}

std::vector<Isa> isa_levels(bool with_test_levels) {
  std::vector<Isa> levels = all_isas(with_test_levels);
  std::erase_if(levels, [](Isa isa) { return !isa_supported(isa); });
  const auto bf16 = std::find(levels.begin(), levels.end(), Isa::avx512bf16);
  if (bf16 != levels.end() && !host().has("fast_avx512bf16")) std::rotate(bf16, bf16 + 1, bf16 + 2);  // avx512vnni is better
  return levels;
}

Isa isa_from_name(std::string_view name) {
  if (name.empty()) return active_isa();
  std::string choices;
  for (Isa isa : isa_levels(true)) {
    if (isa_name(isa) == name) return isa;
    choices += (choices.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  for (Isa isa : all_isas(true))
    if (isa_name(isa) == name)
      fail(ErrorKind::runtime, "[isa] '", name, "' is above this host (", isa_missing(isa), "): choose one of ", choices);
  fail(ErrorKind::runtime, "[isa] unknown level: got '", name, "', expected one of ", choices);
}

Isa active_isa() {
  const char* forced = std::getenv("KTMOE_ISA");
  return forced && *forced ? isa_from_name(forced) : isa_levels(false).front();
}

}  // namespace ktmoe
