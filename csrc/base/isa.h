// What this CPU and this operating system let us execute.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace ktmoe {

enum class Isa {
#define KTMOE_ISA(id, name, test_only) id,
#include "base/isas.inc"
#undef KTMOE_ISA
};

struct CpuFeature {
  const char* name;
  bool present;  // the CPU has it and the system saves its registers
};

struct CpuReport {
  std::string model;
  std::vector<CpuFeature> features;
  std::string amx_permission;  // "granted", "no AMX", or "denied: ..."
};

const CpuReport& cpu_report();  // probed once

// AVX2 instructions are done in halves, as by AMD's Zen 1: such a core sees half as many of them ahead.
extern const bool avx2_in_halves;
// Of the CPUs with AVX-512, it is an AMD Zen 4.
extern const bool zen4;

std::string_view isa_name(Isa isa);
bool isa_supported(Isa isa);
std::string isa_missing(Isa isa);                    // what the host lacks for it; empty if supported
std::vector<Isa> all_isas(bool with_test_levels);    // in the order of isas.inc, whatever this host has
std::vector<Isa> isa_levels(bool with_test_levels);  // those of them that this host can run, its best first

// The best level of the host, or the one KTMOE_ISA names (which may lower the choice, never raise it above the host).
Isa active_isa();
// By name, "" = active_isa(). RuntimeError if unknown or not supported here.
Isa isa_from_name(std::string_view name);

}  // namespace ktmoe
