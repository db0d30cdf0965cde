// Where the tools find the files that come with them.
#ifndef MT_IR_BASE_PATHS_H_
#define MT_IR_BASE_PATHS_H_

#include <string>

namespace mt {

// The folder of the running executable; "" where the system does not say.
std::string ExecutableFolder();

// The folder with the zoo's *.textproto: ../share/mt/models beside an installed executable, else models/ of the source
// tree it was built from. The path is returned even where neither exists.
std::string ModelsFolder();

// The same for the suites of mtlab: ../share/mt/suites, else bench/suites/.
std::string SuitesFolder();

// Where the user's caches are: $XDG_CACHE_HOME/mt, else ~/.cache/mt; "" where there is no home.
std::string CacheFolder();

}  // namespace mt

#endif  // MT_IR_BASE_PATHS_H_
