//! A small map from text, made once and read often.
//!
//! Every agent holds the records of all others, thousands of them, most without a pair: eight bytes then, and otherwise what is
//! there, where a tree's first leaf has room for eleven pairs (600 bytes).
//!
//! Invariants: keys ascend, each occurs once; what is empty holds no allocation; it encodes as a map.
//! Not here: changing one (make another), bounds (the frame that carries it).

use std::fmt;
use std::marker::PhantomData;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Most room that is reserved on a decoder's word for the number of pairs.
const RESERVED_MAX: usize = 64;

/// Maps texts to `V`, in order of key.
#[derive(Clone, PartialEq, Eq)]
pub struct TextMap<V>(Option<Box<Pairs<V>>>);

type Pairs<V> = Box<[(Box<str>, V)]>;

impl<V> TextMap<V> {
    /// Returns the value under `key`.
    pub fn get(&self, key: &str) -> Option<&V> {
        let pairs = self.pairs();
        let at = pairs.binary_search_by(|(own, _)| own.as_ref().cmp(key)).ok()?;
        pairs.get(at).map(|(_, value)| value)
    }

    /// Returns the pairs, in order of key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &V)> {
        self.pairs().iter().map(|(key, value)| (key.as_ref(), value))
    }

    /// Tells whether there is no pair.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    fn pairs(&self) -> &[(Box<str>, V)] {
        self.0.as_deref().map_or(&[], AsRef::as_ref)
    }
}

impl<V> Default for TextMap<V> {
    fn default() -> Self {
        Self(None)
    }
}

impl<K: Into<Box<str>>, V> FromIterator<(K, V)> for TextMap<V> {
    /// Of several values under one key the last one counts.
    fn from_iter<T: IntoIterator<Item = (K, V)>>(pairs: T) -> Self {
        let mut pairs: Vec<(Box<str>, V)> = pairs.into_iter().map(|(key, value)| (key.into(), value)).collect();
        pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
        // The one that is kept is the earlier in the vector: it takes the later one's value.
        pairs.dedup_by(|later, kept| {
            let is_same = later.0 == kept.0;
            if is_same {
                std::mem::swap(&mut later.1, &mut kept.1);
            }
            is_same
        });
        Self((!pairs.is_empty()).then(|| Box::new(pairs.into())))
    }
}

impl<V: fmt::Debug> fmt::Debug for TextMap<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<V: Serialize> Serialize for TextMap<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for TextMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(OfPairs(PhantomData))
    }
}

struct OfPairs<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for OfPairs<V> {
    type Value = TextMap<V>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from text")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TextMap<V>, A::Error> {
        let mut pairs: Vec<(Box<str>, V)> = Vec::with_capacity(map.size_hint().unwrap_or(0).min(RESERVED_MAX));
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(pairs.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::wire;

    #[test]
    fn it_is_what_a_tree_is_on_the_wire_in_json_and_to_readers() {
        let pairs = [("b", 1_u16), ("a", 2), ("c", 3), ("a", 4)];
        let map: TextMap<u16> = pairs.into_iter().collect();
        let tree: BTreeMap<String, u16> = pairs.map(|(key, value)| (key.to_owned(), value)).into();
        assert_eq!(serde_json::to_string(&map).unwrap(), serde_json::to_string(&tree).unwrap());
        let bytes = wire::encode(&tree).unwrap();
        assert_eq!(wire::encode(&map).unwrap(), bytes);
        assert_eq!(wire::decode::<TextMap<u16>>(&bytes, bytes.len()).unwrap(), map);
        assert!(map.iter().map(|(key, value)| (key.to_owned(), *value)).eq(tree));
        assert_eq!((map.get("a"), map.get("c"), map.get("d")), (Some(&4), Some(&3), None));
    }
}
