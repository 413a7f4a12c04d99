// Activation: what an expert does between its two products.
//
//   silu       h = g sigmoid(g) u
//   oai        h = g sigmoid(alpha g) (u + 1)
//   gelu_tanh  h = g sigmoid(2 z(g)) u,  z(g) = sqrt(2 / pi) (g + 0.044715 g^3):  the same as g / 2 (1 + tanh z) u
//   relu2      h = max(u, 0)^2: no gate, so the gate/up matrix is a plain matrix of up
// g and u are clamped first: g <= limit, -limit <= u <= limit (not for relu2). Gradients are those of the clamped function, that is
// zero where the clamp holds a value back and whole on the limit itself.
#pragma once

#include <limits>
#include <string_view>

#include "base/error.h"
#include "format/packed_matrix.h"

namespace ktmoe {

struct Activation {
  enum Kind { silu, oai, gelu_tanh, relu2 };

  Kind kind = silu;
  float limit = std::numeric_limits<float>::infinity();
  float alpha = 1.0f;  // of oai

  bool gated() const { return kind != relu2; }
  int projections() const { return gated() ? 2 : 1; }  // matrices side by side in the gate/up matrix
  int h_per_panel() const { return kPanelColumns / projections(); }

  // limit 0: no clamp. alpha 0: silu as it is; otherwise silu means oai.
  static Activation from_name(std::string_view name, float limit, float alpha) {
    Activation a;
    require(name == "silu" || name == "gelu_tanh" || name == "relu2", ErrorKind::value, "[MoeLayer] activation: got \"", name,
            "\", expected \"silu\", \"gelu_tanh\" or \"relu2\"");
    require(limit >= 0 && alpha >= 0, ErrorKind::value, "[MoeLayer] limit, alpha: got ", limit, ", ", alpha, ", expected 0 or more");
    require(name == "silu" || (limit == 0 && alpha == 0), ErrorKind::value, "[MoeLayer] limit, alpha: got ", limit, ", ", alpha,
            " with activation \"", name, "\", expected 0: only silu has them");
    if (name == "gelu_tanh") a.kind = gelu_tanh;
    if (name == "relu2") a.kind = relu2;
    if (alpha > 0) a.kind = oai, a.alpha = alpha;
    if (limit > 0) a.limit = limit;
    return a;
  }
};

}  // namespace ktmoe
