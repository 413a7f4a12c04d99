// Thread pool and task queue.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstring>
#include <utility>

#include "bindings/bind_layer.h"
#include "runtime/numa_memory.h"
#include "runtime/sub_pools.h"
#include "runtime/task_queue.h"

namespace nb = nanobind;

namespace ktmoe {
namespace {

std::shared_ptr<SubPools> make_pool(const std::vector<int>& threads, const std::vector<int>& nodes, std::vector<Cpus> cpus) {
  require(!threads.empty() && threads.size() == nodes.size(), ErrorKind::value, "[ThreadPool] sub-pools: got ", threads.size(),
          " thread counts and ", nodes.size(), " nodes, expected equally many and at least one");
  require(cpus.empty() || cpus.size() == threads.size(), ErrorKind::value, "[ThreadPool] subpool_cpus: got ", cpus.size(),
          " lists, expected none or ", threads.size());
  cpus.resize(threads.size());
  std::vector<SubPool> subpools;
  for (std::size_t i = 0; i < threads.size(); ++i) subpools.push_back({threads[i], nodes[i], std::move(cpus[i])});
  return std::make_shared<SubPools>(std::move(subpools));
}

// Copies of a forward's inputs, so that the caller may overwrite its own at once.
struct QueuedForward {
  std::vector<bf16> hidden;
  std::vector<std::int32_t> ids32;
  std::vector<std::int64_t> ids64;
  std::vector<float> weights32;
  std::vector<bf16> weights16;
  int n_tokens;

  QueuedForward(const ForwardArgs& args, const MoeConfig& config) : n_tokens(args.routing.n_tokens) {
    for (int t = 0; t < n_tokens; ++t) {
      const bf16* row = args.hidden.data + t * args.hidden.ld;
      hidden.insert(hidden.end(), row, row + config.hidden);
    }
    const std::size_t slots = static_cast<std::size_t>(n_tokens) * static_cast<std::size_t>(config.top_k);
    const Routing& r = args.routing;
    if (r.ids32) ids32.assign(r.ids32, r.ids32 + slots);
    if (r.ids64) ids64.assign(r.ids64, r.ids64 + slots);
    if (r.weights32) weights32.assign(r.weights32, r.weights32 + slots);
    if (r.weights16) weights16.assign(r.weights16, r.weights16 + slots);
  }
  Routing routing() const {
    auto or_null = [](const auto& v) { return v.empty() ? nullptr : v.data(); };
    return {n_tokens, or_null(ids32), or_null(ids64), or_null(weights32), or_null(weights16)};
  }
};

// What a queued forward keeps alive. Python objects may be released only with the GIL, which the queue's thread never asks for: what
// it has finished with waits here until a caller comes by with the GIL.
struct Kept {
  std::shared_ptr<MoeLayer> layer;
  std::shared_ptr<LoraAdapter> lora;
  OutArray out;
  Kept* next = nullptr;
};

// A list without a lock, because fork() may come between any two instructions of the queue's thread.
std::atomic<Kept*> finished{nullptr};

void add_finished(Kept* kept) {
  kept->next = finished.load(std::memory_order_relaxed);
  while (!finished.compare_exchange_weak(kept->next, kept, std::memory_order_release, std::memory_order_relaxed)) {
  }
}

void release_finished() {  // with the GIL
  for (Kept* k = finished.exchange(nullptr, std::memory_order_acquire); k;) delete std::exchange(k, k->next);
}

struct ReleaseFinished {
  ~ReleaseFinished() { release_finished(); }
};

TaskQueue::Ticket submit_forward(TaskQueue& queue, std::shared_ptr<MoeLayer> layer, const InArray& hidden, const InArray& ids,
                                 const InArray& weights, const OutArray& out, std::shared_ptr<LoraAdapter> lora) {
  const ReleaseFinished release;
  const ForwardArgs args = forward_args("submit_forward", *layer, hidden, ids, weights);
  bf16* dst = forward_out("submit_forward", *layer, args, out);
  auto job = std::make_shared<QueuedForward>(args, layer->config());
  std::shared_ptr<Kept> kept(new Kept{std::move(layer), std::move(lora), out}, &add_finished);
  return queue.submit([job, dst, kept = std::move(kept)] {
    const MoeLayer& l = *kept->layer;
    l.forward({job->hidden.data(), l.config().hidden}, job->routing(), dst, kept->lora.get());
  });
}

// f() without the GIL; then, with it, what finished meanwhile is released.
template <class F>
void wait_without_gil(F f) {
  const ReleaseFinished release;
  const WithoutGil nogil;
  f();
}

}  // namespace

void init_runtime(nb::module_& m) {
  nb::class_<SubPools>(m, "ThreadPool")
      .def(nb::new_(&make_pool), nb::arg("subpool_threads"), nb::arg("subpool_nodes"), nb::arg("subpool_cpus") = std::vector<Cpus>())
      .def_prop_ro("threads", &SubPools::threads)
      .def_prop_ro("started", &SubPools::started);
  m.def(
      "node_memory_refused",
      [](int node) {
        const int error = try_prefer_node(node);
        return error ? std::string(std::strerror(error)) : std::string();
      },
      nb::arg("node"));
  nb::class_<TaskQueue::Ticket>(m, "Ticket")
      .def("wait", [](const TaskQueue::Ticket& t) { wait_without_gil([&] { t.wait(); }); })
      .def_prop_ro("done", &TaskQueue::Ticket::done);
  nb::class_<TaskQueue>(m, "TaskQueue")
      .def(nb::init<>())
      .def("submit_forward", &submit_forward, nb::arg("layer"), nb::arg("hidden"), nb::arg("ids"), nb::arg("weights"), nb::arg("out"),
           nb::arg("lora").none() = nb::none())
      .def("drain", [](TaskQueue& q) { wait_without_gil([&] { q.drain(); }); })
      .def(
          "close", [](TaskQueue& q, double timeout) { wait_without_gil([&] { q.close(std::chrono::duration<double>(timeout)); }); },
          nb::arg("timeout_s"));
}

}  // namespace ktmoe
