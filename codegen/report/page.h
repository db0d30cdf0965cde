// The fixed parts of the report's page.
#ifndef MT_CODEGEN_REPORT_PAGE_H_
#define MT_CODEGEN_REPORT_PAGE_H_

#include "absl/strings/string_view.h"

namespace mt {

// Style of the page, beside ChartStyle().
absl::string_view PageStyle();
// What shows the tensor under the pointer, zooms and switches programs. Reads the JSON in the element "plan"; its keys
// are in html.cc.
absl::string_view PageScript();

}  // namespace mt

#endif  // MT_CODEGEN_REPORT_PAGE_H_
