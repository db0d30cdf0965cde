// Op rows as documentation: what `mtc ops [NAME]` prints.
#ifndef MT_IR_DESCRIBE_H_
#define MT_IR_DESCRIBE_H_

#include <string>

#include "ir/op.h"

namespace mt {

// One op, whole: signature, attributes, gradient, effect, and what the machinery may do with it.
std::string DescribeOp(const OpDef& op);

// One line each; derived rows ("gelu.grad0") are left out.
std::string DescribeOps();

}  // namespace mt

#endif  // MT_IR_DESCRIBE_H_
