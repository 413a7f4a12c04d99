// What this machine can do, and which kernel a level uses.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>
#include <sched.h>

#include "base/error.h"
#include "base/isa.h"
#include "format/format.h"

namespace nb = nanobind;

namespace ktmoe {
namespace {

std::vector<std::string> names_of(const std::vector<Isa>& levels) {
  std::vector<std::string> names;
  for (Isa isa : levels) names.emplace_back(isa_name(isa));
  return names;
}

nb::dict report() {
  const CpuReport& cpu = cpu_report();
  nb::dict features, r;
  for (const auto& f : cpu.features) features[f.name] = f.present;
  nb::list levels;
  for (Isa isa : all_isas(false)) {
    nb::dict level;
    level["name"] = std::string(isa_name(isa));
    level["supported"] = isa_supported(isa);
    level["why"] = isa_missing(isa);
    levels.append(level);
  }
  cpu_set_t set;
  r["model"] = cpu.model;
  r["features"] = features;
  r["amx_permission"] = cpu.amx_permission;
  r["isa_levels"] = levels;
  r["affinity_cpus"] = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 0;
  return r;
}

// "decode" (one or two rows) never uses tiles; the rest does where the level has them.
std::string kernel_name(const std::string& op, const std::string& format, const std::string& isa) {
  require(op == "decode" || op == "forward" || op == "backward", ErrorKind::value, "[kernel_name] op: got '", op,
          "', expected decode, forward or backward");
  const Isa level = isa_from_name(isa);
  const bool few_rows_on_vectors = op == "decode" && level == Isa::amx;
  return op + "/" + format_info(format_from_name(format)).name + "/" + std::string(isa_name(few_rows_on_vectors ? Isa::avx512vnni : level));
}

}  // namespace

void init_cpu(nb::module_& m) {
  m.def("cpu_report", &report);
  m.def("isa_levels", [] { return names_of(isa_levels(false)); });
  m.def("test_isa_levels", [] { return names_of(isa_levels(true)); });
  m.def("active_isa", [] { return std::string(isa_name(active_isa())); });
  m.def("kernel_name", &kernel_name, nb::arg("op"), nb::arg("format"), nb::arg("isa"));
  m.def("formats", [] {
    std::vector<std::string> names;
    for (WeightFormat f : all_formats()) names.emplace_back(format_info(f).name);
    return names;
  });
}

}  // namespace ktmoe
