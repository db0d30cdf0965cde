// nlohmann's JSON, whose classes are compiled once, in json.cc, instead of in each source that uses them.
#ifndef MT_IR_BASE_JSON_H_
#define MT_IR_BASE_JSON_H_

#include "nlohmann/json.hpp"

extern template class nlohmann::basic_json<>;                       // nlohmann::json
extern template class nlohmann::basic_json<nlohmann::ordered_map>;  // nlohmann::ordered_json

#endif  // MT_IR_BASE_JSON_H_
