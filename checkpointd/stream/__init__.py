"""The Xen migration stream: records, reader, writer, libxl framing, verification."""
