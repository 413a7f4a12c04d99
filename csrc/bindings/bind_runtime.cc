// Thread pool and task queue.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/vector.h>

#include <utility>

#include "bindings/bind_layer.h"
#include "bindings/release.h"
#include "runtime/task_queue.h"
#include "runtime/thread_pool.h"

namespace nb = nanobind;

namespace ktmoe {
namespace {

std::shared_ptr<ThreadPool> make_pool(const std::vector<int>& threads, const std::vector<int>& nodes) {
  require(!threads.empty() && threads.size() == nodes.size(), ErrorKind::value, "[ThreadPool] sub-pools: got ", threads.size(),
          " thread counts and ", nodes.size(), " nodes, expected equally many and at least one");
  std::vector<SubPool> subpools;
  for (std::size_t i = 0; i < threads.size(); ++i) subpools.push_back({threads[i], nodes[i]});
  return std::make_shared<ThreadPool>(std::move(subpools));
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

// What a queued forward keeps alive.
struct Kept : Releasable {
  Kept(std::shared_ptr<MoeLayer> l, std::shared_ptr<LoraAdapter> a, const OutArray& o) : layer(std::move(l)), lora(std::move(a)), out(o) {}
  std::shared_ptr<MoeLayer> layer;
  std::shared_ptr<LoraAdapter> lora;
  OutArray out;
};

// wait(time) without the GIL until it says true. In between, Python handles signals (Ctrl-C), and what finished is released.
template <class Wait>
void wait_interruptibly(Wait wait) {
  const ReleaseAtExit release;
  for (;;) {
    {
      const WithoutGil nogil;
      if (wait(Seconds(0.1))) return;
    }
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
  }
}

TaskQueue::Ticket submit(TaskQueue& queue, TaskQueue::Task task, bool block) {
  for (;;) {
    if (auto ticket = queue.try_submit(task)) return *ticket;
    require(block, ErrorKind::runtime, "[submit_forward] the queue is full: got ", queue.capacity(),
            " tasks that wait, expected fewer than its bound, ", queue.capacity());
    wait_interruptibly([&](Seconds time) { return queue.wait_for_room(time); });
  }
}

TaskQueue::Ticket submit_forward(TaskQueue& queue, std::shared_ptr<MoeLayer> layer, const InArray& hidden, const InArray& ids,
                                 const InArray& weights, const OutArray& out, std::shared_ptr<LoraAdapter> lora, bool block) {
  const ReleaseAtExit release;
  const ForwardArgs args = forward_args("submit_forward", *layer, hidden, ids, weights);
  bf16* dst = forward_out("submit_forward", *layer, args, out);
  auto job = std::make_shared<QueuedForward>(args, layer->config());
  auto kept = share_releasable(std::make_unique<Kept>(std::move(layer), std::move(lora), out));
  auto task = [job, dst, kept = std::move(kept)] {
    const MoeLayer& l = *kept->layer;
    l.forward({job->hidden.data(), l.config().hidden}, job->routing(), dst, kept->lora.get());
  };
  return submit(queue, std::move(task), block);
}

void close(TaskQueue& queue, double timeout_s) {
  require(timeout_s >= 0 && timeout_s < 1e9, ErrorKind::value, "[TaskQueue] timeout_s: got ", timeout_s, ", expected 0 to 1e9");
  const ReleaseAtExit release;
  const WithoutGil nogil;
  queue.close(Seconds(timeout_s));
}

}  // namespace

void init_runtime(nb::module_& m) {
  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::new_(&make_pool), nb::arg("subpool_threads"), nb::arg("subpool_nodes"))
      .def_prop_ro("threads", &ThreadPool::threads)
      .def_prop_ro("started", &ThreadPool::started);
  nb::class_<TaskQueue::Ticket>(m, "Ticket")
      .def("wait", [](const TaskQueue::Ticket& t) { wait_interruptibly([&](Seconds time) { return t.wait_for(time); }); })
      .def_prop_ro("done", &TaskQueue::Ticket::done);
  nb::class_<TaskQueue>(m, "TaskQueue")
      .def(nb::init<int>(), nb::arg("capacity") = 256)
      .def_prop_ro("capacity", &TaskQueue::capacity)
      .def("submit_forward", &submit_forward, nb::arg("layer"), nb::arg("hidden"), nb::arg("ids"), nb::arg("weights"), nb::arg("out"),
           nb::arg("lora").none() = nb::none(), nb::arg("block") = true)
      .def("drain", [](TaskQueue& q) { wait_interruptibly([&](Seconds time) { return q.drain(time); }); })
      .def("close", &close, nb::arg("timeout_s"));
}

}  // namespace ktmoe
