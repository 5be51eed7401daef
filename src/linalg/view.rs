//! Parts of row-major matrices of f32, to read and to write.

use faer::{MatMut, MatRef};

/// A matrix of f32, or a part of one.
#[derive(Clone, Copy)]
pub struct View<'a>(pub(super) MatRef<'a, f32>);

impl<'a> View<'a> {
    /// All of `values` \[rows, columns\].
    pub fn new(values: &'a [f32], rows: usize, columns: usize) -> View<'a> {
        View(MatRef::from_row_major_slice(values, rows, columns))
    }

    /// `rows` rows and `columns` columns from the place `at`, a row and a column.
    pub fn part(self, at: (usize, usize), rows: usize, columns: usize) -> View<'a> {
        View(self.0.submatrix(at.0, at.1, rows, columns))
    }

    /// Rows as columns.
    pub fn transpose(self) -> View<'a> {
        View(self.0.transpose())
    }
}

/// A matrix of f32 to write, or a part of one.
pub struct ViewMut<'a>(pub(super) MatMut<'a, f32>);

impl<'a> ViewMut<'a> {
    /// All of `values` \[rows, columns\].
    pub fn new(values: &'a mut [f32], rows: usize, columns: usize) -> ViewMut<'a> {
        ViewMut(MatMut::from_row_major_slice_mut(values, rows, columns))
    }

    /// As [`View::part`].
    pub fn part(self, at: (usize, usize), rows: usize, columns: usize) -> ViewMut<'a> {
        ViewMut(self.0.submatrix_mut(at.0, at.1, rows, columns))
    }

    pub fn rows(&self) -> usize {
        self.0.nrows()
    }

    /// The first `n` rows and the others.
    pub fn split_rows(self, n: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        let (above, below) = self.0.split_at_row_mut(n);
        (ViewMut(above), ViewMut(below))
    }

    /// The first `n` columns and the others.
    pub fn split_columns(self, n: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        let (left, right) = self.0.split_at_col_mut(n);
        (ViewMut(left), ViewMut(right))
    }

    /// Copies `values`, a matrix of as many rows, to the columns from `column` on.
    pub fn set_columns(&mut self, column: usize, values: View<'_>) {
        self.0.as_mut().subcols_mut(column, values.0.ncols()).copy_from(values.0);
    }
}
