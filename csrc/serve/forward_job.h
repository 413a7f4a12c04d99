// ForwardJob: one forward as a task queue runs it, in one part or in two:
//   run_now    out = the experts whose result is awaited + what the job `earlier` has put off
//   run_later  later = the deferred experts, while the caller goes on; the job of a later layer adds them to its output
// Both parts, and those of `earlier`, run on the thread of one queue, in the order in which they were submitted.
#pragma once

#include <exception>

#include "moe/layer.h"
#include "serve/split.h"

namespace ktmoe {

class ForwardJob {
 public:
  struct Deferral {
    int protected_k = 0;            // entries of each token that are never deferred
    bf16* later = nullptr;          // [n_tokens][hidden]; null: nothing is deferred
    ForwardJob* earlier = nullptr;  // or null
  };

  // All memory is the owner's, for as long as the job; n_tokens of `routing` is not used.
  ForwardJob(const MoeLayer& layer, const LoraAdapter* lora, Tokens hidden, const Routing& routing, bf16* out, const Deferral& deferral)
      : layer_(layer), lora_(lora), hidden_(hidden), routing_(routing), out_(out), deferral_(deferral) {}

  bool defers() const { return deferral_.later != nullptr; }
  void run_now(int n_tokens);
  void run_later();
  void forget_earlier() { deferral_.earlier = nullptr; }  // its part has been added

 private:
  void add_earlier() const;

  const MoeLayer& layer_;
  const LoraAdapter* const lora_;
  const Tokens hidden_;
  Routing routing_;
  bf16* const out_;
  Deferral deferral_;
  SplitRouting split_;
  enum { nothing, done, failed } later_ = nothing;
  std::exception_ptr error_;  // of either part
};

}  // namespace ktmoe
