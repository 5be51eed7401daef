//! Transforms that leave a model's function as it is and make its weights easier to round: what they are worth.

pub mod qsur;
pub mod qsur_report;
pub mod spread;
