// Thread pool and task queue.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <utility>

#include "bindings/bind_job.h"
#include "bindings/release.h"
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
  auto job = make_job("submit_forward", std::move(layer), hidden, ids, weights, out, std::move(lora), {});
  return submit(queue, [job] { job->run_now(); }, block);
}

TaskQueue::Ticket submit_now(TaskQueue& queue, const OwningJob& job, bool block) {
  return submit(queue, [job = job.shared] { job->run_now(); }, block);
}

TaskQueue::Ticket submit_later(TaskQueue& queue, const OwningJob& job) {
  require(job.shared->defers(), ErrorKind::runtime, "[submit_later] job: got one that defers nothing");
  return queue.submit_beyond_capacity([job = job.shared] { job->run_later(); });
}

void close(TaskQueue& queue, double timeout_s) {
  require(timeout_s >= 0 && timeout_s < 1e9, ErrorKind::value, "[TaskQueue] timeout_s: got ", timeout_s, ", expected 0 to 1e9");
  const ReleaseAtExit release;
  const WithoutGil nogil;
  queue.close(Seconds(timeout_s));
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
      .def("wait", [](const TaskQueue::Ticket& t) { wait_interruptibly([&](Seconds time) { return t.wait_for(time); }); })
      .def_prop_ro("done", &TaskQueue::Ticket::done);
  nb::class_<TaskQueue>(m, "TaskQueue")
      .def(nb::init<int>(), nb::arg("capacity") = 256)
      .def_prop_ro("capacity", &TaskQueue::capacity)
      .def("submit_forward", &submit_forward, nb::arg("layer"), nb::arg("hidden"), nb::arg("ids"), nb::arg("weights"), nb::arg("out"),
           nb::arg("lora").none() = nb::none(), nb::arg("block") = true)
      .def("submit", &submit_now, nb::arg("job"), nb::arg("block") = true)
      .def("submit_later", &submit_later, nb::arg("job"))
      .def("drain", [](TaskQueue& q) { wait_interruptibly([&](Seconds time) { return q.drain(time); }); })
      .def("close", &close, nb::arg("timeout_s"));
}

}  // namespace ktmoe
