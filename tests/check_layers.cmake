# Each layer knows only those below it (run with cmake -DSOURCE_DIR=... -P):
#   csrc/, but for csrc/torch: no header of PyTorch
#   csrc/torch, but for auto*.cpp: of PyTorch only the stable ABI's headers
#   csrc/torch/include, the header of C++ programs: nothing of ours
#   csrc/torch: of libpnn only the public headers

set(failures "")
set(checked 0)

function(check_includes file allow deny message)
  file(STRINGS ${file} lines REGEX "^[ \t]*#[ \t]*include")
  foreach(line IN LISTS lines)
    if(line MATCHES "${deny}" AND NOT (allow AND line MATCHES "${allow}"))
      set(failures "${failures}\n  ${file}: ${line}\n    ${message}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
endfunction()

file(GLOB_RECURSE files ${SOURCE_DIR}/csrc/*.c ${SOURCE_DIR}/csrc/*.h ${SOURCE_DIR}/csrc/*.cpp)
foreach(file IN LISTS files)
  math(EXPR checked "${checked} + 1")
  if(NOT file MATCHES "/csrc/torch/")
    check_includes(${file} "" "[<\"](torch|ATen|c10|caffe2)/" "libpnn is usable without PyTorch")
  else()
    get_filename_component(name ${file} NAME)
    if(file MATCHES "/csrc/torch/include/")
      check_includes(${file} "" "[<\"](pnn/|torch_pnn/|[^/>]*[.]h\")" "a program has this header and LibTorch's alone")
    elseif(NOT name MATCHES "^auto(grad|cast)")
      check_includes(${file}
        "[<\"]torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/" "[<\"](torch|ATen|c10|caffe2)/"
        "outside autograd and autocast the shim keeps to the stable ABI")
    endif()
    check_includes(${file} "" "[<\"]([.][.]/|kernels/|internal[.]h)" "the shim sees libpnn's public headers only")
  endif()
endforeach()

if(checked EQUAL 0)
  message(FATAL_ERROR "found no source below ${SOURCE_DIR}/csrc")
endif()
if(failures)
  message(FATAL_ERROR "includes across the layers:${failures}")
endif()
message(STATUS "${checked} files keep to their layer")
