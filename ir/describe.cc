#include "ir/describe.h"

#include <algorithm>
#include <vector>

#include "absl/algorithm/container.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"

namespace mt {
namespace {

absl::string_view PolicyText(RematPolicy policy) {
  switch (policy) {
    case RematPolicy::kMustSave:
      return "must be saved";
    case RematPolicy::kPreferSave:
      return "better saved";
    case RematPolicy::kPreferRecompute:
      return "better recomputed";
    case RematPolicy::kMustRecompute:
      return "always recomputed: it costs nothing";
  }
  return "";
}

absl::string_view AutocastText(Autocast autocast) {
  switch (autocast) {
    case Autocast::kAlways:
      return "computes in the low precision";
    case Autocast::kFollow:
      return "follows its operands";
    case Autocast::kNever:
      return "stays in f32";
  }
  return "";
}

bool IsElementWiseWithOneResult(const OpDef& op) { return op.is_element_wise() && op.results.size() == 1; }

// Rows that FindDerivative returns.
absl::flat_hash_set<const OpDef*> DerivedRows() {
  absl::flat_hash_set<const OpDef*> derived;
  for (const OpDef* op : AllOps()) {
    for (size_t i = 0; IsElementWiseWithOneResult(*op) && i < op->operands.size(); ++i) {
      if (const DerivedOp* row = FindDerivative(*op, static_cast<int>(i))) derived.insert(row->op);
    }
  }
  return derived;
}

std::string GradientText(const OpDef& op) {
  std::vector<absl::string_view> carriers;  // Operands that a gradient may flow to.
  for (size_t i = 0; i < op.operands.size(); ++i) {
    const int index = static_cast<int>(i);
    if (absl::c_linear_search(op.no_grad_operands, index)) continue;
    if (IsElementWiseWithOneResult(op) ? FindDerivative(op, index) != nullptr : op.grad != nullptr) {
      carriers.push_back(op.operands[i]);
    }
  }
  return carriers.empty() ? "none" : absl::StrCat("for ", absl::StrJoin(carriers, ", "));
}

}  // namespace

std::string DescribeOp(const OpDef& op) {
  std::string text = absl::StrCat(op.name, ": ", op.summary, "\n");
  const auto line = [&](absl::string_view label, absl::string_view value) {
    absl::StrAppendFormat(&text, "  %-14s %s\n", label, value);
  };
  line("signature",
       absl::StrCat(op.name, "(", absl::StrJoin(op.operands, ", "), ") -> ", absl::StrJoin(op.results, ", ")));
  for (const AttrSpec& attr : op.attrs) {
    const std::string value = attr.default_text.empty() ? absl::StrCat(attr.name, " (", AttrKindName(attr.kind), ")")
                                                        : absl::StrCat(attr.name, "=", attr.default_text);
    line("attribute", absl::StrFormat("%-22s %s", value, attr.doc));
  }
  line("gradient", GradientText(op));
  line("kind", op.is_view             ? "a view: no code runs"
               : op.is_element_wise() ? "element-wise: reference, gradient and kernels come from one expression"
                                      : "a kernel of its own");
  if (op.effect == Effect::kCollective) line("effect", "collective: order kept, never repeated or removed");
  line("remat", PolicyText(op.remat));
  line("autocast", AutocastText(op.autocast));
  line("tolerance", absl::StrCat(op.tolerance, " of the largest element, f32 against f64"));
  return text;
}

std::string DescribeOps() {
  const absl::flat_hash_set<const OpDef*> derived = DerivedRows();
  size_t width = 0;
  for (const OpDef* op : AllOps()) {
    if (!derived.contains(op)) width = std::max(width, op->name.size());
  }
  std::string text;
  for (const OpDef* op : AllOps()) {
    if (derived.contains(op)) continue;
    absl::StrAppend(&text, absl::StrFormat("%-*s  %s\n", static_cast<int>(width), op->name, op->summary));
  }
  return text;
}

}  // namespace mt
