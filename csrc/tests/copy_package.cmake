#cmake - DFROM = ... / rskernels - DTO = ... - P copy_package.cmake : the package's Python files, without its own build.
file(COPY ${FROM} DESTINATION ${TO} FILES_MATCHING PATTERN "*.py" PATTERN "__pycache__" EXCLUDE)
