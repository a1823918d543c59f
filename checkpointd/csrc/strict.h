/*
 * Included first by each of our own C files, and by nothing else: it asks the compiler for the
 * warnings that generated code (the cffi binding) and Python's headers would drown, and states what
 * the code relies on.
 */
#ifndef CHECKPOINTD_STRICT_H
#define CHECKPOINTD_STRICT_H

#pragma GCC diagnostic warning "-Wconversion"
#pragma GCC diagnostic warning "-Wshadow"
#pragma GCC diagnostic warning "-Wstrict-prototypes"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "records, bitmaps and digests are little endian and are built in place"
#endif

#endif
