# What the CPU module and its native tests are built of.

# The inner loops (csrc/cpu/isa) are compiled once per instruction set and chosen at run time.
# add_cpu_routines(OPTIONS) sets routine_objects; OPTIONS is an interface library, and learns whether
# there is a choice.
function(add_cpu_routines options)
  set(routine_objects)
  function(add_routines isa)
    set(sources)
    foreach(source adjoint columns dense isa packed sparse)
      list(APPEND sources ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc/cpu/isa/${source}.cpp)
    endforeach()
    add_library(birl_routines_${isa} OBJECT ${sources})
    target_link_libraries(birl_routines_${isa} PRIVATE ${options})
    target_compile_definitions(birl_routines_${isa} PRIVATE BIRL_ISA=${isa})
    target_compile_options(birl_routines_${isa} PRIVATE ${ARGN})
    set(routine_objects ${routine_objects} $<TARGET_OBJECTS:birl_routines_${isa}> PARENT_SCOPE)
  endfunction()

  add_routines(baseline)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$" AND CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
    add_routines(avx2 -mavx2 -mfma)
    # GCC 12 sees uninitialised values inside its own AVX-512 header (its bug 105593).
    add_routines(avx512 -mavx512f -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512
      -Wno-uninitialized -Wno-maybe-uninitialized)
    target_compile_definitions(${options} INTERFACE BIRL_X86_DISPATCH)
  endif()
  set(routine_objects ${routine_objects} PARENT_SCOPE)
endfunction()

set(cpu_sources)
foreach(source entry/policy_solve entry/solve entry/solve_vjp isa/dispatch model/sparse_pattern support/parallel)
  list(APPEND cpu_sources ${CMAKE_CURRENT_LIST_DIR}/../csrc/cpu/${source}.cpp)
endforeach()
