# Compiler and linker flags, each with what goes wrong without it.
#
# Sets PNN_C_FLAGS, PNN_CXX_FLAGS, PNN_SHARED_LINK_FLAGS and PNN_NO_UNDEFINED, and applies PNN_SANITIZE to everything.

set(PNN_C_FLAGS
  # Without it GCC contracts a * b + c to a fused multiply-add on its own wherever the instruction set has one, so the
  # instruction sets round differently and results stop being bitwise equal. We write fma where we mean it.
  -ffp-contract=off
  # Without it every sqrt has a branch for errno and does not vectorise. Nobody reads errno here.
  -fno-math-errno
  # Without it every internal function is exported: two libraries that both hold libpnn then share one by accident, and
  # the linker can't inline or drop any. PNN_API marks what is public.
  -fvisibility=hidden
  # Without it the folder that built a library stands in it, and the same sources give other files elsewhere.
  -ffile-prefix-map=${PROJECT_SOURCE_DIR}/=
  -Wall -Wextra -Wconversion)

# -Wconversion is for our C: PyTorch's inline templates, instantiated in our files, would drown it in C++.
set(PNN_CXX_FLAGS -ffp-contract=off -fvisibility=hidden -fvisibility-inlines-hidden
  -ffile-prefix-map=${PROJECT_SOURCE_DIR}/= -Wall -Wextra)

if(PNN_WERROR)
  list(APPEND PNN_C_FLAGS -Werror)
  list(APPEND PNN_CXX_FLAGS -Werror)
endif()
if(CMAKE_C_COMPILER_ID STREQUAL "GNU")
  # GCC notes for each vector type wider than the baseline's registers that its calling convention changed in GCC 4.6.
  # Ours are passed between static functions of one file only.
  list(APPEND PNN_C_FLAGS -Wno-psabi)
endif()

if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC 12 sees overlapping copies inside its own std::string in C++20 (GCC bug 105651), which PyTorch 2.14 asks for.
  list(APPEND PNN_CXX_FLAGS -Wno-restrict)
endif()

set(PNN_NO_UNDEFINED "")
if(CMAKE_SYSTEM_NAME STREQUAL "Linux" AND NOT PNN_SANITIZE)
  # Without it a missing symbol is found by the user, when the library is loaded, and not by us, when it is linked.
  # (Sanitized libraries leave the sanitizer's own symbols to the program.)
  set(PNN_NO_UNDEFINED LINKER:--no-undefined)
endif()
set(PNN_SHARED_LINK_FLAGS ${PNN_NO_UNDEFINED})

if(PNN_SANITIZE)
  if(NOT PNN_SANITIZE MATCHES "^(address|undefined|address,undefined|thread)$")
    message(FATAL_ERROR
      "PNN_SANITIZE is '${PNN_SANITIZE}'; it should be address, undefined, address,undefined or thread")
  endif()
  # A finding ends the program, or a test run would print it and still pass.
  add_compile_options(-fsanitize=${PNN_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -g1)
  add_link_options(-fsanitize=${PNN_SANITIZE})
endif()
