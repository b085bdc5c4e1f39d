//! storied
